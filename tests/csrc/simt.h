// A GPU in a CPU thread: device code compiled as ordinary C++ runs here, so that its numbers can be tested anywhere.
//
// The threads of a block are fibers. One runs until it waits for others, then one of those that need not wait is drawn
// at random: code that lacks a barrier meets orders in which it fails. Blocks run one after another, in random order.
// Shared memory holds NaN until it is written, and asynchronous copies happen early or late, by chance. Waiting for
// threads that never come, or that wait for something else, is an error and not a deadlock; so is to go on for ever.
//
// What is modelled is what csrc/include/quietstar uses: whole warps only, no atomics on floats, no communication
// between blocks. Caches, alignment of accesses and time are not.
#pragma once

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace simt {

constexpr int kWarp = 32;
constexpr int kMostOperations = 50000;  // collective ones of a warp, far more than any kernel here needs in a test
constexpr std::size_t kStackBytes = 64 << 10, kSharedBytes = 227 << 10;

struct Index {
  unsigned x = 0;
};

// What a lane shows to the other lanes of its warp in one collective operation.
struct Posted {
  alignas(16) unsigned char bytes[32];
};

struct PendingCopy {
  void* to;
  const void* from;  // null: zeros

  void run() const {
    if (from) {
      std::memcpy(to, from, 16);
    } else {
      std::memset(to, 0, 16);
    }
  }
};

struct Fiber {
  Index thread;
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  enum { kFresh, kReady, kAtBarrier, kInWarp, kDone } state = kFresh;
  int operations = 0;               // collective operations of the warp that this lane has entered
  const char* operation = nullptr;  // the last of them
  std::deque<std::vector<PendingCopy>> copies;
};

struct Block {
  std::vector<Fiber> fibers;
  // Two sets, used in turn: whoever enters the next operation has read what it wanted of this one, and not more than
  // one operation lies between the first lane of a warp and the last.
  std::vector<Posted> posted[2];
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  ucontext_t scheduler_start;
  jmp_buf scheduler;
  std::string failure;
  alignas(128) unsigned char shared[kSharedBytes];
  std::size_t dynamic_bytes = 0;
  std::mt19937 random;
};

inline Block block;
inline Index block_index, block_size, grid_size;
inline std::uint32_t random_seed = 0;
inline std::string
    fault;  // what the GPU does wrong, to show that tests notice: "barrier", "shuffle", "copy" or nothing
// Who runs kernels instead, if anybody: name, blocks, threads, bytes of dynamic shared memory, parameter, its bytes.
inline std::function<void(const char*, std::int64_t, int, std::size_t, const void*, std::size_t)> launcher;
inline std::size_t static_bytes = 0;  // of static shared memory, in all kernels together

inline void wait_as(decltype(Fiber::state) state) {
  Fiber* self = block.current;
  self->state = state;
  if (_setjmp(self->resume) == 0) _longjmp(block.scheduler, 1);
}

// Ends the block with an error. Exceptions cannot leave a fiber's stack.
[[noreturn]] inline void fail(const std::string& what) {
  block.failure =
      what + " (block " + std::to_string(block_index.x) + ", thread " + std::to_string(block.current->thread.x) + ")";
  _longjmp(block.scheduler, 1);
}

inline void enter_fiber() {
  (*block.body)();
  block.current->state = Fiber::kDone;
  _longjmp(block.scheduler, 1);
}

inline void release(Fiber* first, Fiber* last, decltype(Fiber::state) waiting) {
  for (Fiber* fiber = first; fiber != last; ++fiber) {
    if (fiber->state == waiting) fiber->state = Fiber::kReady;
  }
}

// Lets those go on that all they wait for have joined; false if nobody can ever go on.
inline bool release_waiting() {
  Fiber* const all = block.fibers.data();
  const std::size_t count = block.fibers.size();
  const auto every = [](Fiber* first, std::size_t number, auto predicate) {
    return std::all_of(first, first + number, predicate);
  };
  bool released = false;
  for (std::size_t lane = 0; lane < count; lane += kWarp) {
    Fiber* warp = all + lane;
    if (!every(warp, kWarp, [](const Fiber& f) { return f.state == Fiber::kInWarp; })) continue;
    if (!every(warp, kWarp, [&](const Fiber& f) { return f.operation == warp->operation; })) {
      block.current = warp;
      block.failure = std::string("lanes of a warp wait in different operations, one of them ") + warp->operation;
      return false;
    }
    release(warp, warp + kWarp, Fiber::kInWarp);
    released = true;
  }
  const bool barrier =
      every(all, count, [](const Fiber& f) { return f.state == Fiber::kAtBarrier || f.state == Fiber::kDone; });
  if (barrier) release(all, all + count, Fiber::kAtBarrier);
  return released || barrier;
}

inline void run_block(int threads, const std::function<void()>& body) {
  block.body = &body;
  block.failure.clear();
  std::memset(block.shared, 0xFF, sizeof block.shared);
  for (auto& posted : block.posted) posted.assign(threads, Posted{});
  if ((int)block.fibers.size() != threads) {
    block.fibers.clear();
    block.fibers.resize(threads);
  }
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.thread.x = i;
    fiber.state = Fiber::kFresh;
    fiber.operations = 0;
    fiber.copies.assign(1, {});
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter_fiber, 0);
  }
  while (block.failure.empty()) {
    static std::vector<Fiber*> runnable;
    runnable.clear();
    bool finished = true;
    for (Fiber& fiber : block.fibers) {
      if (fiber.state == Fiber::kFresh || fiber.state == Fiber::kReady) runnable.push_back(&fiber);
      finished &= fiber.state == Fiber::kDone;
    }
    if (finished) return;
    if (runnable.empty()) {
      if (!release_waiting() && block.failure.empty()) block.failure = "threads wait for others that never come";
      continue;
    }
    std::shuffle(runnable.begin(), runnable.end(), block.random);
    for (Fiber* fiber : runnable) {
      block.current = fiber;
      if (_setjmp(block.scheduler) == 0) {
        if (fiber->state == Fiber::kFresh) {
          setcontext(&fiber->start);
        } else {
          _longjmp(fiber->resume, 1);
        }
      }
      if (!block.failure.empty()) break;
    }
  }
  throw std::runtime_error("SIMT shim: " + block.failure);
}

inline void run_grid(std::int64_t blocks, int threads, std::size_t dynamic_bytes, const std::function<void()>& body) {
  if (threads < 1 || threads > 1024 || threads % kWarp) {
    throw std::runtime_error("SIMT shim: blocks have 32, 64, ... 1024 threads, not " + std::to_string(threads));
  }
  if (static_bytes + dynamic_bytes > kSharedBytes) throw std::runtime_error("SIMT shim: too much shared memory");
  block.random.seed(random_seed);
  block.dynamic_bytes = dynamic_bytes;
  block_size.x = threads;
  grid_size.x = (unsigned)blocks;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), block.random);
  for (unsigned index : order) {
    block_index.x = index;
    run_block(threads, body);
  }
}

inline int lane() { return block.current->thread.x % kWarp; }

// Waits for the whole warp, and returns what its lanes posted.
template <class T>
const Posted* exchange(const char* operation, const T& value) {
  static_assert(sizeof(T) <= sizeof(Posted));
  Fiber* self = block.current;
  if (self->operations == kMostOperations) fail("a warp goes on and on");
  std::vector<Posted>& posted = block.posted[self->operations++ % 2];
  std::memcpy(posted[self->thread.x].bytes, &value, sizeof value);
  self->operation = operation;
  wait_as(Fiber::kInWarp);
  return &posted[self->thread.x / kWarp * kWarp];
}

template <class T>
T posted_by(const Posted* warp, int lane) {
  T value;
  std::memcpy(&value, warp[lane].bytes, sizeof value);
  return value;
}

inline void whole_warp(unsigned mask) {
  if (mask != 0xFFFFFFFFu) fail("only whole warps are modelled");
}

inline std::size_t reserve_static(std::size_t bytes) {
  const std::size_t offset = static_bytes;
  static_bytes += (bytes + 127) / 128 * 128;
  return offset;
}

}  // namespace simt

#define threadIdx (simt::block.current->thread)
#define blockIdx (simt::block_index)
#define blockDim (simt::block_size)
#define gridDim (simt::grid_size)

inline void __syncthreads() {
  if (simt::fault != "barrier") simt::wait_as(simt::Fiber::kAtBarrier);
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  simt::whole_warp(mask);
  simt::exchange("__syncwarp", 0);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  simt::whole_warp(mask);
  return simt::posted_by<T>(simt::exchange("__shfl_sync", value), source % simt::kWarp);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  simt::whole_warp(mask);
  const simt::Posted* warp = simt::exchange("__shfl_xor_sync", value);
  return simt::posted_by<T>(warp, simt::fault == "shuffle" ? simt::lane() : simt::lane() ^ distance);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  simt::whole_warp(mask);
  const simt::Posted* warp = simt::exchange("__ballot_sync", predicate);
  unsigned votes = 0;
  for (int lane = 0; lane < simt::kWarp; ++lane) votes |= (unsigned)simt::posted_by<bool>(warp, lane) << lane;
  return votes;
}

inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == 0xFFFFFFFFu; }

// Fibers are never interrupted, so nothing can come between the two halves of an atomic operation.
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

template <class T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((std::uint64_t)a * b >> 32); }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

using std::max;
using std::min;

// What csrc/include/quietstar/device.cuh does with PTX and the CUDA runtime.
namespace quietstar::cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, std::size_t shared_bytes, const Launch&,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  if (!simt::launcher) return simt::run_grid(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
  if constexpr (sizeof...(Parameters) == 1) {
    Dl_info kernel_symbol;
    if (!dladdr(reinterpret_cast<void*>(kernel), &kernel_symbol) || !kernel_symbol.dli_sname) {
      throw std::runtime_error("a kernel without a name");
    }
    const std::tuple<Parameters...> parameter(arguments...);
    simt::launcher(kernel_symbol.dli_sname, blocks, threads, shared_bytes, &std::get<0>(parameter),
                   sizeof(std::get<0>(parameter)));
  } else {
    throw std::runtime_error("kernels that are handed over have one parameter");
  }
}

template <class T>
T& static_shared() {
  static const std::size_t offset = simt::reserve_static(sizeof(T));
  return *reinterpret_cast<T*>(simt::block.shared + offset);
}

inline unsigned char* dynamic_shared() {
  return simt::block.shared + simt::kSharedBytes / 128 * 128 - (simt::block.dynamic_bytes + 127) / 128 * 128;
}

inline float exp2_approximate(float x) { return std::exp2(x); }
inline float reciprocal_approximate(float x) { return 1 / x; }

inline float float16_to_float(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp((float)mantissa, -24));
}

inline std::uint16_t float_to_float16(float x) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7FFF;
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size == 0) return sign;
  int exponent;
  std::frexp(size, &exponent);
  const int shift = std::max(exponent - 11, -24);                            // of the last of 11 bits
  const int rounded = (int)std::nearbyint(std::ldexp(size, -shift));         // to even
  const int bits = shift == -24 ? rounded : ((shift + 24) << 10) + rounded;  // a carry goes to the exponent
  return sign | (std::uint16_t)bits;
}

inline std::uint16_t float_to_bfloat16(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  if (std::isnan(x)) return 0x7FFF;
  return (std::uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// cp.async: 16 bytes to shared memory, or as many zeros; done at once or, as likely, not before it is waited for.
inline void copy_async(void* shared, const void* global, bool inside) {
  const simt::PendingCopy copy{shared, inside ? global : nullptr};
  if (simt::block.random() % 2) {
    copy.run();
  } else {
    simt::block.current->copies.back().push_back(copy);
  }
}

inline void commit_copies() { simt::block.current->copies.emplace_back(); }

template <int kPending>
void wait_for_copies() {
  auto& groups = simt::block.current->copies;
  if (simt::fault == "copy") return;
  while ((int)groups.size() > kPending + 1) {
    for (const simt::PendingCopy& copy : groups.front()) copy.run();
    groups.pop_front();
  }
}

// ldmatrix: four 8×8 matrices of 16-bit numbers. Lane i names the row i % 8 of matrix i / 8 in shared memory.
template <bool kTransposed>
void load_matrices(std::uint32_t (&registers)[4], const void* row) {
  const simt::Posted* warp = simt::exchange(kTransposed ? "ldmatrix.trans" : "ldmatrix", row);
  const int lane = simt::lane();
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int line = kTransposed ? lane % 4 * 2 + i : lane / 4, column = kTransposed ? lane / 4 : lane % 4 * 2 + i;
      pair[i] = simt::posted_by<const std::uint16_t*>(warp, matrix * 8 + line)[column];
    }
    std::memcpy(&registers[matrix], pair, 4);
  }
}

// mma.m16n8k16: sum += a · b with 16-bit numbers in a and b, float32 in the sum.
template <class T>
void multiply_accumulate(float (&sum)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  struct Operands {
    std::uint16_t a[4][2], b[2][2];
  } operands;
  std::memcpy(operands.a, a, sizeof operands.a);
  std::memcpy(operands.b, b, sizeof operands.b);
  const simt::Posted* warp = simt::exchange("mma", operands);
  const int lane = simt::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Operands &left = *reinterpret_cast<const Operands*>(warp[row % 8 * 4 + k % 8 / 2].bytes),
                     &right = *reinterpret_cast<const Operands*>(warp[column * 4 + k % 8 / 2].bytes);
      const T x{left.a[row / 8 + k / 8 * 2][k % 2]}, y{right.b[k / 8][k % 2]};
      sum[i] += to_float(x) * to_float(y);
    }
  }
}

}  // namespace quietstar::cuda
