// Numbers in memory: their types, and accesses of up to 16 bytes.
#pragma once

#include <type_traits>

#include "quietstar/contract.h"
#include "quietstar/device.cuh"

namespace quietstar::cuda {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float to_float(Float16 x) { return float16_to_float(x.bits); }

// The nearest T, to even on ties.
template <class T>
__device__ __forceinline__ T rounded(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {float_to_bfloat16(x)};
  } else {
    return {float_to_float16(x)};
  }
}

// Two neighbours in a register of 32 bits, the first in its lower half.
template <class T>
__device__ __forceinline__ std::uint32_t packed(float first, float second) {
  return rounded<T>(first).bits | static_cast<std::uint32_t>(rounded<T>(second).bits) << 16;
}

// N adjacent elements, read or written by one instruction; aligned to their total size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T element[N];
};

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(to) = vector;
}

template <class T>
constexpr int kWidest = 16 / sizeof(T);

template <class T>
__host__ __device__ __forceinline__ unsigned misalignment(const T* pointer) {
  return static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(pointer) % 16);
}

// Calls function(example) with an example of the type that a dtype stands for.
template <class Function>
void with_dtype(DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float{});
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat16:
      return function(Float16{});
  }
  refuse("dtype", "be 0 (float32), 1 (bfloat16) or 2 (float16)", static_cast<int>(dtype));
}

}  // namespace quietstar::cuda
