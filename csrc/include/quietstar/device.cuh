// The few instructions and calls used by kernels that are not plain CUDA C++.
//
// Kernels include nothing else of CUDA and depend neither on Python nor on torch. In tests they are compiled by an
// ordinary compiler with tests/csrc/simt.h, which implements all of this on the host.
#pragma once

#include <cstdint>
#include <type_traits>

#include "quietstar/cuda_kernels.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace quietstar::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a device current, and restores the previous one at the end.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = previous_ != device;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Launches a one-dimensional grid, if it has any blocks. Neither allocates nor waits, so graphs can capture it.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, std::size_t shared_bytes,
            const Launch& where, const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::invalid_argument("a launch has at most 2^31 - 1 blocks");
  const CurrentDevice current(where.device);
  constexpr std::size_t kGranted = 32 << 10;  // out of 48 KiB with static shared memory; more must be requested
  if (shared_bytes > kGranted) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "shared memory of a kernel");
  }
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = dim3(static_cast<unsigned>(blocks));
  configuration.blockDim = dim3(threads);
  configuration.dynamicSmemBytes = shared_bytes;
  configuration.stream = static_cast<cudaStream_t>(where.stream);
  check(cudaLaunchKernelEx(&configuration, kernel, Parameters(arguments)...), "launch of a kernel");
}

// Shared memory of the block for one T; further calls for the same T return the same memory.
template <class T>
__device__ __forceinline__ T& static_shared() {
  __shared__ alignas(128) unsigned char bytes[sizeof(T)];
  return *reinterpret_cast<T*>(bytes);
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ uint4 quietstar_dynamic_shared[];
  return reinterpret_cast<unsigned char*>(quietstar_dynamic_shared);
}

// 2^x to 2 units in the last place; results below the smallest normal number are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1/x to 1 unit in the last place; results below the smallest normal number are 0.
__device__ __forceinline__ float reciprocal_approximate(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float float16_to_float(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ std::uint16_t float_to_float16(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ std::uint16_t float_to_bfloat16(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// Copies 16 bytes, or as many zeros, to shared memory; complete once the group has been waited for.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(inside ? 16 : 0)
               : "memory");
}

// The copies since the last call form a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all of this thread's groups except the last kPending.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8×8 matrices of 16-bit numbers. Lane i gives the address of row i % 8 of matrix i / 8, 16 aligned bytes of
// shared memory. Every lane gets two neighbours of each matrix, those at lane % 4 * 2 of row (or column) lane / 4.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(std::uint32_t (&registers)[4], const void* row) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
}

struct BFloat16;

// sum [16, 8] += a [16, 16] · b [16, 8] by a warp, in the layout of mma.m16n8k16.
template <class T>
__device__ __forceinline__ void multiply_accumulate(float (&sum)[4], const std::uint32_t (&a)[4],
                                                    const std::uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace quietstar::cuda

#else

#include "simt.h"

#endif
