// Vectors of float32 as wide as the registers of one instruction set, by the vector extensions of GCC and Clang.
//
// A kernel's source is compiled once per instruction set, each time in a namespace of its own. Everything here is local
// to its translation unit, and no templates of the standard library are used: the linker keeps one copy of those, and
// it might be one that this machine cannot run.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#ifndef QUIETSTAR_ISA
#error "kernels are compiled with QUIETSTAR_ISA, the name of their namespace"
#endif

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(kLanes * 4)));
using IntVec = int32_t __attribute__((vector_size(kLanes * 4)));
using WordVec = uint32_t __attribute__((vector_size(kLanes * 4)));
using WideVec = uint64_t __attribute__((vector_size(kLanes * 4)));  // half as many words of twice the size

constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -3.4e38f;  // the maximum of an empty set of logits; −inf − (−inf) would be NaN

inline Vec splat(float x) { return x - Vec{}; }  // x + 0 would be an operation: it turns −0 into 0

inline IntVec lane_numbers() {
  IntVec numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  return numbers;
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Which lanes of a vector are in a row: all of them, or only the first few, after which the row ends.
struct Whole {};
struct Part {
  int count;
};

inline Vec load(const float* from, Whole) {
  Vec v;
  memcpy(&v, from, sizeof v);
  return v;
}

inline Vec load(const float* from, Part part) {
  Vec v{};
  memcpy(&v, from, part.count * sizeof *from);
  return v;
}

using HalfVec = uint16_t __attribute__((vector_size(kLanes * 2)));

inline Vec widened(HalfVec bits) { return (Vec)(__builtin_convertvector(bits, WordVec) << 16); }

inline Vec load(const BFloat16* from, Whole) {
  HalfVec bits;
  memcpy(&bits, from, sizeof bits);
  return widened(bits);
}

inline Vec load(const BFloat16* from, Part part) {
  HalfVec bits{};
  memcpy(&bits, from, part.count * sizeof *from);
  return widened(bits);
}

// Rounded to the nearest, ties to even; NaN stays NaN.
inline HalfVec narrowed(Vec v) {
  const WordVec bits = (WordVec)v;
  const WordVec rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : WordVec{} + 0x7FC0, HalfVec);
}

inline void store(float* to, Vec v, Whole) { memcpy(to, &v, sizeof v); }

inline void store(float* to, Vec v, Part part) { memcpy(to, &v, part.count * sizeof *to); }

inline void store(BFloat16* to, Vec v, Whole) {
  const HalfVec bits = narrowed(v);
  memcpy(to, &bits, sizeof bits);
}

inline void store(BFloat16* to, Vec v, Part part) {
  const HalfVec bits = narrowed(v);
  memcpy(to, &bits, part.count * sizeof *to);
}

template <class T>
float load_one(const T* from) {
  return load(from, Part{1})[0];
}

template <class T>
void store_one(T* to, float x) {
  store(to, splat(x), Part{1});
}

// v with `other` in the lanes behind the end of the row.
inline Vec inside_or(Vec v, float, Whole) { return v; }
inline Vec inside_or(Vec v, float other, Part part) { return lane_numbers() < part.count ? v : splat(other); }

// Calls body(column, Whole or Part) for the vectors of columns begin..end.
template <class Body>
inline __attribute__((always_inline)) void for_vectors(int64_t begin, int64_t end, Body body) {
  int64_t column = begin;
  for (; column + kLanes <= end; column += kLanes) body(column, Whole{});
  if (column < end) body(column, Part{(int)(end - column)});
}

// Columns that are gone over before the next ones. They stay in the L1 cache, and their sums, added up in double, round
// far less than one long sum in float32.
constexpr int64_t kBlock = 512;

// Calls body(begin, end) for the blocks of columns 0..size.
template <class Body>
inline __attribute__((always_inline)) void for_blocks(int64_t size, Body body) {
  for (int64_t begin = 0; begin < size; begin += kBlock) body(begin, begin + kBlock < size ? begin + kBlock : size);
}

inline float sum_of(Vec v) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) v[lane] += v[lane + half];
  }
  return v[0];
}

inline float largest_of(Vec v) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) v[lane] = v[lane] > v[lane + half] ? v[lane] : v[lane + half];
  }
  return v[0];
}

// e^x to within 1 unit in the last place for all x: 0 below, infinity above the range of float32, NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, e^r by Cephes' polynomial (Moshier), 2^n in two factors: the product of both is
// then also right where the result is subnormal, and rounded once.
inline Vec exp(Vec x) {
  x = x < -104.0f ? splat(-104.0f) : x;
  x = x > 89.0f ? splat(89.0f) : x;
  const Vec to_integer = splat(12582912.0f);  // 1.5 · 2^23: added and taken away, it rounds to whole numbers
  const Vec shifted = x * 1.44269504088896341f + to_integer;
  const Vec n = shifted - to_integer;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntVec exponent = (IntVec)shifted - 0x4B400000;
  const IntVec half = exponent >> 1;
  return p * (Vec)((half + 127) << 23) * (Vec)((exponent - half + 127) << 23);
}

// ln x to within 1 unit in the last place, for positive normal x.
//
// x = m 2^e with m in [√½, √2), ln m by Cephes' polynomial (Moshier).
inline Vec log(Vec x) {
  const IntVec bits = (IntVec)x;
  const IntVec exponent = (bits - 0x3F3504F3) >> 23;  // of √½
  const Vec e = __builtin_convertvector(exponent, Vec);
  const Vec f = (Vec)(bits - (exponent << 23)) - 1.0f;
  const Vec square = f * f;
  Vec p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec low = p * f * square + e * -2.12194440e-4f - 0.5f * square;
  return f + low + e * 0.693359375f;
}

// tanh x to within 2 units in the last place for all x, NaN for NaN: Cephes' polynomial (Moshier) near 0, where
// 1 − 2 / (e^2x + 1) would lose digits.
inline Vec tanh(Vec x) {
  const IntVec sign = (IntVec)x & INT32_MIN;
  const Vec size = (Vec)((IntVec)x ^ sign), square = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec far = 1 - 2 / (exp(2 * size) + 1);
  return (Vec)((IntVec)(size < 0.625f ? p * square * size + size : far) | sign);
}

// Computes cap · tanh(logit / cap), but keeps infinities, so that a token of probability 0 stays impossible.
inline void cap_logits(float* logits, int64_t count, float cap) {
  for_vectors(0, count, [&](int64_t v, auto extent) {
    const Vec x = load(logits + v, extent);
    store(logits + v, ((x == kInfinity) | (x == -kInfinity)) ? x : cap * tanh(x / cap), extent);
  });
}

inline float exp(float x) { return exp(splat(x))[0]; }
inline float log(float x) { return log(splat(x))[0]; }

// Uninitialised memory for the threads of a kernel, aligned to cache lines.
class Scratch {
 public:
  explicit Scratch(int64_t floats_each, int threads) : floats_each_((floats_each + 15) / 16 * 16) {
    const size_t bytes = floats_each_ * threads * sizeof(float);
    if (posix_memalign(&memory_, 64, bytes ? bytes : 64)) out_of_memory();
  }
  ~Scratch() { free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* of_thread(int thread) const { return static_cast<float*>(memory_) + thread * floats_each_; }

 private:
  int64_t floats_each_;
  void* memory_ = nullptr;
};

}  // namespace
}  // namespace quietstar::cpu::QUIETSTAR_ISA
