// cvt [9.7.9 Data Movement and Conversion Instructions: cvt]. Immediates: rounding, .ftz, .sat.

#include <cmath>
#include <limits>

#include "meaning.h"
#include "numbers.h"

namespace ptx {

enum Rounding : s64 { kRn, kRz, kRm, kRp, kRni, kRzi, kRmi, kRpi };

static double rounded(double x, s64 rounding) {
  switch (rounding) {
    case kRz:
    case kRzi:
      return std::trunc(x);
    case kRm:
    case kRmi:
      return std::floor(x);
    case kRp:
    case kRpi:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

#define INTEGER_TO(D, to, X, from) UNARY("cvt." to "." from, D, X, x)
#define INTEGER_TO_INTEGERS(X, from)                            \
  INTEGER_TO(u8, "u8", X, from)                                 \
  INTEGER_TO(s8, "s8", X, from)                                 \
  INTEGER_TO(u16, "u16", X, from)                               \
  INTEGER_TO(s16, "s16", X, from)                               \
  INTEGER_TO(u32, "u32", X, from)                               \
  INTEGER_TO(s32, "s32", X, from)                               \
  INTEGER_TO(u64, "u64", X, from)                               \
  INTEGER_TO(s64, "s64", X, from)                               \
  UNARY("cvt.f32." from, float, X, x)                           \
  UNARY("cvt.f64." from, double, X, x)                          \
  UNARY("cvt.f16." from, u16, X, to_f16(static_cast<float>(x))) \
  UNARY("cvt.bf16." from, u16, X, to_bf16(static_cast<float>(x)))
INTEGER_TO_INTEGERS(u16, "u16")
INTEGER_TO_INTEGERS(s16, "s16")
INTEGER_TO_INTEGERS(u32, "u32")
INTEGER_TO_INTEGERS(s32, "s32")
INTEGER_TO_INTEGERS(u64, "u64")
INTEGER_TO_INTEGERS(s64, "s64")

// To integers: what does not fit becomes the nearest that does; NaN becomes 0, or 2^63 in 64 bits.
template <class D>
static D to_integer(double x, s64 rounding) {
  if (x != x) return sizeof(D) == 8 ? static_cast<D>(1ull << 63) : D{0};
  x = rounded(x, rounding);
  if (x <= static_cast<double>(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
  if (x >= static_cast<double>(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
  return static_cast<D>(x);
}
#define TO_INTEGER(D, to)                                               \
  UNARY("cvt." to ".f32", D, float, to_integer<D>(x, in.immediate[0]))  \
  UNARY("cvt." to ".f64", D, double, to_integer<D>(x, in.immediate[0])) \
  UNARY("cvt." to ".f16", D, u16, to_integer<D>(from_f16(x), in.immediate[0]))
TO_INTEGER(s32, "s32")
TO_INTEGER(u32, "u32")
TO_INTEGER(s64, "s64")
TO_INTEGER(u64, "u64")

UNARY("cvt.f32.f16", float, u16, from_f16(x))
UNARY("cvt.f32.bf16", float, u16, from_bf16(x))
UNARY("cvt.f64.f32", double, float, x)
UNARY("cvt.f32.f64", float, double, x)
UNARY("cvt.f16.f32", u16, float, to_f16(x))
UNARY("cvt.bf16.f32", u16, float, in.immediate[0] == kRz ? to_bf16_toward_zero(x) : to_bf16(x))
UNARY("cvt.f64.f64", double, double, rounded(x, in.immediate[0]))
static float to_float(float x, const Instruction& in) {
  if (in.immediate[1]) x = flushed(x);
  if (in.immediate[0] >= kRni) x = static_cast<float>(rounded(x, in.immediate[0]));
  if (in.immediate[2]) x = x != x ? 0.0f : std::min(1.0f, std::max(0.0f, x));
  return x;
}
UNARY("cvt.f32.f32", float, float, to_float(x, in))
BINARY("cvt.bf16x2.f32", u32, float, float, u32{to_bf16(y)} | u32{to_bf16(x)} << 16)
BINARY("cvt.f16x2.f32", u32, float, float, u32{to_f16(y)} | u32{to_f16(x)} << 16)
UNARY("cvt.tf32.f32", u32, u32, (x + 0x1000u) & ~0x1fffu)  // .rna

}  // namespace ptx
