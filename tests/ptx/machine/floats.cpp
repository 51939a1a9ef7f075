// Floating point [9.7.3 Floating Point Instructions, 9.7.4 Half Precision Floating Point Instructions].
//
// Compiled without contraction. The approximate functions are correctly rounded here, which no GPU promises.

#include <cmath>

#include "meaning.h"
#include "numbers.h"

namespace ptx {

static bool unordered(float x, float y) { return x != x || y != y; }

// Toward zero: the double sum is exact, or so close that only its float neighbours matter.
static float sum_toward_zero(float x, float y) {
  const double exact = double{x} + double{y};
  const float rounded = static_cast<float>(exact);
  if (std::isinf(rounded) && !std::isinf(exact)) return std::copysign(3.40282347e38f, rounded);
  if (rounded != rounded || std::isinf(rounded)) return rounded;
  return std::fabs(double{rounded}) > std::fabs(exact) ? std::nextafterf(rounded, 0.0f) : rounded;
}

#define FLOAT_BINARY(name, result) BINARY(name ".f32", float, float, float, result)
FLOAT_BINARY("add", x + y)
FLOAT_BINARY("sub", x - y)
FLOAT_BINARY("mul", x* y)
FLOAT_BINARY("div", x / y)
FLOAT_BINARY("add.rz", sum_toward_zero(x, y))
FLOAT_BINARY("sub.rz", sum_toward_zero(x, -y))
FLOAT_BINARY("min", minimum(x, y))
FLOAT_BINARY("max", maximum(x, y))
FLOAT_BINARY("min.NaN", unordered(x, y) ? canonical_nan() : minimum(x, y))
FLOAT_BINARY("max.NaN", unordered(x, y) ? canonical_nan() : maximum(x, y))
FLOAT_BINARY("copysign", std::copysign(y, x))
FLOAT_BINARY("add.ftz", flushed(flushed(x) + flushed(y)))
FLOAT_BINARY("sub.ftz", flushed(flushed(x) - flushed(y)))
FLOAT_BINARY("mul.ftz", flushed(flushed(x) * flushed(y)))
FLOAT_BINARY("div.ftz", flushed(flushed(x) / flushed(y)))
FLOAT_BINARY("min.ftz", minimum(flushed(x), flushed(y)))
FLOAT_BINARY("max.ftz", maximum(flushed(x), flushed(y)))
FLOAT_BINARY("min.ftz.NaN", unordered(x, y) ? canonical_nan() : minimum(flushed(x), flushed(y)))
FLOAT_BINARY("max.ftz.NaN", unordered(x, y) ? canonical_nan() : maximum(flushed(x), flushed(y)))
TERNARY("min3.f32", float, float, float, float, minimum(minimum(x, y), z))
TERNARY("max3.f32", float, float, float, float, maximum(maximum(x, y), z))
TERNARY("fma.f32", float, float, float, float, __builtin_fmaf(x, y, z))
TERNARY("fma.ftz.f32", float, float, float, float, flushed(__builtin_fmaf(flushed(x), flushed(y), flushed(z))))

// Two of 32 bits in a register of 64.
static float lower(u64 x) { return float_of(static_cast<u32>(x)); }
static float upper(u64 x) { return float_of(static_cast<u32>(x >> 32)); }
static u64 pair_of(float low, float high) { return u64{bits_of(low)} | u64{bits_of(high)} << 32; }
#define PAIR_BINARY(name, op) BINARY(name ".f32x2", u64, u64, u64, pair_of(lower(x) op lower(y), upper(x) op upper(y)))
PAIR_BINARY("add", +)
PAIR_BINARY("sub", -)
PAIR_BINARY("mul", *)
TERNARY("fma.f32x2", u64, u64, u64, u64,
        pair_of(__builtin_fmaf(lower(x), lower(y), lower(z)), __builtin_fmaf(upper(x), upper(y), upper(z))))

#define FLOAT_UNARY(name, result)             \
  UNARY(name ".f32", float, float, result(x)) \
  UNARY(name ".ftz.f32", float, float, flushed(result(flushed(x))))
static float negated(float x) { return float_of(bits_of(x) ^ 0x80000000u); }
static float magnitude(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
static float reciprocal(float x) { return 1.0f / x; }
static float reciprocal_root(float x) { return static_cast<float>(1.0 / std::sqrt(double{x})); }
FLOAT_UNARY("neg", negated)
FLOAT_UNARY("abs", magnitude)
FLOAT_UNARY("rcp", reciprocal)
FLOAT_UNARY("sqrt", std::sqrt)
FLOAT_UNARY("rsqrt", reciprocal_root)
FLOAT_UNARY("ex2", exp2f)
FLOAT_UNARY("lg2", log2f)
FLOAT_UNARY("sin", sinf)
FLOAT_UNARY("cos", cosf)
FLOAT_UNARY("tanh", tanhf)

#define DOUBLE_BINARY(name, result) BINARY(name ".f64", double, double, double, result)
DOUBLE_BINARY("add", x + y)
DOUBLE_BINARY("sub", x - y)
DOUBLE_BINARY("mul", x* y)
DOUBLE_BINARY("div", x / y)
DOUBLE_BINARY("min", std::fmin(x, y))
DOUBLE_BINARY("max", std::fmax(x, y))
TERNARY("fma.f64", double, double, double, double, __builtin_fma(x, y, z))
UNARY("neg.f64", double, double, -x)
UNARY("abs.f64", double, double, std::fabs(x))

// 16 bits: computed in a wider format and rounded once. Those packed in pairs do the same to both halves.
template <class Of>
static u32 of_halves(u32 x, u32 y, u32 z, Of of) {
  return u32{of(u16(x), u16(y), u16(z))} | u32{of(u16(x >> 16), u16(y >> 16), u16(z >> 16))} << 16;
}
#define HALF(name, type, result)                              \
  TERNARY(name "." type, u16, u16, u16, u16, result(x, y, z)) \
  TERNARY(name "." type "x2", u32, u32, u32, u32, of_halves(x, y, z, result))
#define HALF_BINARY(name, type, result)                 \
  BINARY(name "." type, u16, u16, u16, result(x, y, 0)) \
  BINARY(name "." type "x2", u32, u32, u32, of_halves(x, y, 0, result))
#define HALVES(type, from, to)                                                                                    \
  static u16 PTX_JOIN(from, _add)(u16 x, u16 y, u16) { return to(float(double{from(x)} + from(y))); }             \
  static u16 PTX_JOIN(from, _sub)(u16 x, u16 y, u16) { return to(float(double{from(x)} - from(y))); }             \
  static u16 PTX_JOIN(from, _mul)(u16 x, u16 y, u16) { return to(from(x) * from(y)); }                            \
  static u16 PTX_JOIN(from, _min)(u16 x, u16 y, u16) { return to(minimum(from(x), from(y))); }                    \
  static u16 PTX_JOIN(from, _max)(u16 x, u16 y, u16) { return to(maximum(from(x), from(y))); }                    \
  static u16 PTX_JOIN(from, _fma)(u16 x, u16 y, u16 z) { return to(float(double{from(x)} * from(y) + from(z))); } \
  HALF_BINARY("add", type, PTX_JOIN(from, _add))                                                                  \
  HALF_BINARY("sub", type, PTX_JOIN(from, _sub))                                                                  \
  HALF_BINARY("mul", type, PTX_JOIN(from, _mul))                                                                  \
  HALF_BINARY("min", type, PTX_JOIN(from, _min))                                                                  \
  HALF_BINARY("max", type, PTX_JOIN(from, _max))                                                                  \
  HALF("fma", type, PTX_JOIN(from, _fma))                                                                         \
  UNARY("neg." type, u16, u16, x ^ 0x8000)                                                                        \
  UNARY("abs." type, u16, u16, x & 0x7fff)                                                                        \
  UNARY("neg." type "x2", u32, u32, x ^ 0x80008000u)                                                              \
  UNARY("abs." type "x2", u32, u32, x & 0x7fff7fffu)
HALVES("f16", from_f16, to_f16)
HALVES("bf16", from_bf16, to_bf16)

// 16 bits and 32 [9.7.5 Mixed Precision Floating Point Instructions].
#define MIXED(type, from)                                 \
  BINARY("add.f32." type, float, u16, float, from(x) + y) \
  BINARY("sub.f32." type, float, u16, float, from(x) - y) \
  TERNARY("fma.f32." type, float, u16, u16, float, __builtin_fmaf(from(x), from(y), z))
MIXED("f16", from_f16)
MIXED("bf16", from_bf16)

}  // namespace ptx
