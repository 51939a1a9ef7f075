// Numbers of 16 and 32 bits as instructions see them.
#pragma once

#include <cstring>

#include "machine.h"

namespace ptx {

inline u32 bits_of(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(u32 bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float from_bf16(u16 x) { return float_of(u32{x} << 16); }
inline u16 to_bf16(float x) {
  const u32 bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u16 to_bf16_toward_zero(float x) {
  const u32 bits = bits_of(x);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : static_cast<u16>(bits >> 16);
}

inline float from_f16(u16 x) {
  _Float16 half;
  std::memcpy(&half, &x, 2);
  return static_cast<float>(half);
}
inline u16 to_f16(float x) {
  if (x != x) return 0x7fff;
  const _Float16 half = static_cast<_Float16>(x);
  u16 bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

// Elements of matrices: immediates of mma and wgmma.
enum MatrixType : s64 { kMatrixF16, kMatrixBf16, kMatrixTf32 };
inline float element(u32 x, s64 type) { return type == kMatrixBf16 ? from_bf16(u16(x)) : from_f16(u16(x)); }

// .ftz: subnormal numbers are zeros of their sign.
inline float flushed(float x) {
  const u32 bits = bits_of(x);
  return bits & 0x7f800000 ? x : float_of(bits & 0x80000000);
}

// min and max give the operand that is no NaN, and -0 < +0; with .NaN any NaN wins.
inline float canonical_nan() { return float_of(0x7fffffff); }
inline float minimum(float x, float y) {
  if (x != x) return y;
  if (y != y) return x;
  if (x == y) return float_of(bits_of(x) | bits_of(y));
  return x < y ? x : y;
}
inline float maximum(float x, float y) {
  if (x != x) return y;
  if (y != y) return x;
  if (x == y) return float_of(bits_of(x) & bits_of(y));
  return x > y ? x : y;
}

}  // namespace ptx
