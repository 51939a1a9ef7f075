// Integers and bits [9.7.1 Integer Arithmetic Instructions, 9.7.8 Logic and Shift Instructions].

#include <type_traits>

#include "meaning.h"

namespace ptx {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// Division by zero and of the smallest number by -1 are left open by PTX; here they are what GPUs give.
template <class T>
static T quotient(T x, T y) {
  if (y == 0) return static_cast<T>(-1);
  if (std::is_signed_v<T> && y == static_cast<T>(-1)) return static_cast<T>(0 - static_cast<Unsigned<T>>(x));
  return static_cast<T>(x / y);
}
template <class T>
static T remainder(T x, T y) {
  if (y == 0) return x;
  if (std::is_signed_v<T> && y == static_cast<T>(-1)) return 0;
  return static_cast<T>(x % y);
}

#define INTEGERS(T, type)                                                                 \
  BINARY("add." type, T, T, T, static_cast<Unsigned<T>>(x) + static_cast<Unsigned<T>>(y)) \
  BINARY("sub." type, T, T, T, static_cast<Unsigned<T>>(x) - static_cast<Unsigned<T>>(y)) \
  BINARY("div." type, T, T, T, quotient<T>(x, y))                                         \
  BINARY("rem." type, T, T, T, remainder<T>(x, y))                                        \
  BINARY("min." type, T, T, T, x < y ? x : y)                                             \
  BINARY("max." type, T, T, T, x > y ? x : y)                                             \
  UNARY("neg." type, T, T, Unsigned<T>{0} - static_cast<Unsigned<T>>(x))                  \
  UNARY("abs." type, T, T, x < T{0} ? Unsigned<T>{0} - static_cast<Unsigned<T>>(x) : static_cast<Unsigned<T>>(x))
INTEGERS(s16, "s16")
INTEGERS(u16, "u16")
INTEGERS(s32, "s32")
INTEGERS(u32, "u32")
INTEGERS(s64, "s64")
INTEGERS(u64, "u64")
BINARY("min.relu.s32", s32, s32, s32, std::max(0, std::min(x, y)))
BINARY("max.relu.s32", s32, s32, s32, std::max(0, std::max(x, y)))

#define PRODUCTS(T, Wide, type)                                                                        \
  BINARY("mul.lo." type, T, T, T, static_cast<u64>(x) * static_cast<u64>(y))                           \
  TERNARY("mad.lo." type, T, T, T, T, static_cast<u64>(x) * static_cast<u64>(y) + static_cast<u64>(z)) \
  BINARY("mul.wide." type, Wide, T, T, static_cast<Wide>(x) * static_cast<Wide>(y))                    \
  TERNARY("mad.wide." type, Wide, T, T, Wide,                                                          \
          static_cast<u64>(static_cast<Wide>(x) * static_cast<Wide>(y)) + static_cast<u64>(z))
PRODUCTS(s16, s32, "s16")
PRODUCTS(u16, u32, "u16")
PRODUCTS(s32, s64, "s32")
PRODUCTS(u32, u64, "u32")
BINARY("mul.lo.s64", s64, u64, u64, x* y)
BINARY("mul.lo.u64", u64, u64, u64, x* y)
TERNARY("mad.lo.s64", s64, u64, u64, u64, x* y + z)
TERNARY("mad.lo.u64", u64, u64, u64, u64, x* y + z)
BINARY("mul.hi.s32", s32, s32, s32, s64{x} * s64{y} >> 32)
BINARY("mul.hi.u32", u32, u32, u32, u64{x} * u64{y} >> 32)
BINARY("mul.hi.s64", s64, s64, s64, static_cast<__int128>(x) * y >> 64)
BINARY("mul.hi.u64", u64, u64, u64, static_cast<unsigned __int128>(x) * y >> 64)
TERNARY("mad.hi.s32", s32, s32, s32, s32, (s64{x} * s64{y} >> 32) + z)
TERNARY("mad.hi.u32", u32, u32, u32, u32, (u64{x} * u64{y} >> 32) + z)

#define BITS(T, type)                 \
  BINARY("and." type, T, T, T, x& y)  \
  BINARY("or." type, T, T, T, x | y)  \
  BINARY("xor." type, T, T, T, x ^ y) \
  UNARY("not." type, T, T, ~x)        \
  UNARY("mov." type, T, T, x)         \
  BINARY("shl." type, T, T, u32, y >= sizeof(T) * 8 ? 0 : x << y)
BITS(u16, "b16")
BITS(u32, "b32")
BITS(u64, "b64")

// Shifts by the width or more leave only the sign.
#define RIGHT_SHIFT(T, type) \
  BINARY("shr." type, T, T, u32, y < sizeof(T) * 8 ? x >> y : std::is_signed_v<T> && x < T{0} ? T(-1) : T{0})
RIGHT_SHIFT(u16, "u16")
RIGHT_SHIFT(u32, "u32")
RIGHT_SHIFT(u64, "u64")
RIGHT_SHIFT(s16, "s16")
RIGHT_SHIFT(s32, "s32")
RIGHT_SHIFT(s64, "s64")

// Funnel shifts of y:x.
TERNARY("shf.l.wrap.b32", u32, u32, u32, u32, (u64{y} << 32 | x) << (z & 31) >> 32)
TERNARY("shf.r.wrap.b32", u32, u32, u32, u32, (u64{y} << 32 | x) >> (z & 31))
TERNARY("shf.l.clamp.b32", u32, u32, u32, u32, z >= 32 ? u64{x} : (u64{y} << 32 | x) << z >> 32)
TERNARY("shf.r.clamp.b32", u32, u32, u32, u32, z >= 32 ? u64{y} : (u64{y} << 32 | x) >> z)

// Bit fields: position and length are the last 8 bits of their operands.
template <class T>
static T extracted(T x, u32 position, u32 length) {
  constexpr u32 kBits = sizeof(T) * 8;
  position &= 255;
  length &= 255;
  const Unsigned<T> bits = static_cast<Unsigned<T>>(x);
  const bool sign = std::is_signed_v<T> && length && bits >> std::min(position + length - 1, kBits - 1) & 1;
  Unsigned<T> result = 0;
  for (u32 k = 0; k < kBits; ++k) {
    const bool bit = k < length && position + k < kBits ? bits >> (position + k) & 1 : sign;
    result |= static_cast<Unsigned<T>>(bit) << k;
  }
  return static_cast<T>(result);
}
template <class T>
static T inserted(T from, T into, u32 position, u32 length) {
  position &= 255;
  length &= 255;
  for (u32 k = 0; k < length && position + k < sizeof(T) * 8; ++k) {
    const T bit = T{1} << (position + k);
    into = (into & ~bit) | (from >> k & 1 ? bit : 0);
  }
  return into;
}
TERNARY("bfe.u32", u32, u32, u32, u32, extracted<u32>(x, y, z))
TERNARY("bfe.s32", s32, s32, u32, u32, extracted<s32>(x, y, z))
TERNARY("bfe.u64", u64, u64, u32, u32, extracted<u64>(x, y, z))
TERNARY("bfe.s64", s64, s64, u32, u32, extracted<s64>(x, y, z))
#define INSERTION(T, type)                                                                                  \
  MEANING("bfi." type) {                                                                                    \
    const T *from = warp.values<T>(in, 1), *into = warp.values<T>(in, 2);                                   \
    const u32 *position = warp.values<u32>(in, 3), *length = warp.values<u32>(in, 4);                       \
    put<T>(warp, in, active, [&](int l) { return inserted<T>(from[l], into[l], position[l], length[l]); }); \
  }
INSERTION(u32, "b32")
INSERTION(u64, "b64")

UNARY("popc.b32", u32, u32, __builtin_popcount(x))
UNARY("popc.b64", u32, u64, __builtin_popcountll(x))
UNARY("clz.b32", u32, u32, x ? __builtin_clz(x) : 32)
UNARY("clz.b64", u32, u64, x ? __builtin_clzll(x) : 64)
static u32 highest_bit(u32 x) { return x ? 31 - __builtin_clz(x) : ~0u; }
UNARY("bfind.u32", u32, u32, highest_bit(x))
UNARY("bfind.s32", u32, u32, highest_bit(static_cast<s32>(x) < 0 ? ~x : x))
static u32 reversed(u32 x) {
  u32 result = 0;
  for (int k = 0; k < 32; ++k) result |= (x >> k & 1) << (31 - k);
  return result;
}
UNARY("brev.b32", u32, u32, reversed(x))

// prmt: each byte of the result is one of 8, or copies of its sign.
static u32 permuted(u32 low, u32 high, u32 selectors) {
  const u64 bytes = u64{high} << 32 | low;
  u32 result = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 selector = selectors >> 4 * k & 15;
    u32 byte = bytes >> 8 * (selector & 7) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * k;
  }
  return result;
}
TERNARY("prmt.b32", u32, u32, u32, u32, permuted(x, y, z))

// lop3: the last operand is the truth table.
MEANING("lop3.b32") {
  const u32 *xs = warp.values<u32>(in, 1), *ys = warp.values<u32>(in, 2), *zs = warp.values<u32>(in, 3);
  const u32 table = warp.values<u32>(in, 4)[first_lane(active)];
  put<u32>(warp, in, active, [&](int lane) {
    u32 result = 0;
    for (int k = 0; k < 8; ++k) {
      const u32 row = (k & 4 ? xs[lane] : ~xs[lane]) & (k & 2 ? ys[lane] : ~ys[lane]) & (k & 1 ? zs[lane] : ~zs[lane]);
      if (table >> k & 1) result |= row;
    }
    return result;
  });
}

// mov between a register and a vector of narrower ones [mov, second form].
MEANING("pack.b32.b16") {
  const u16 *low = warp.values<u16>(in, 1), *high = warp.values<u16>(in, 2);
  put<u32>(warp, in, active, [&](int l) { return u32{low[l]} | u32{high[l]} << 16; });
}
MEANING("pack.b64.b32") {
  const u32 *low = warp.values<u32>(in, 1), *high = warp.values<u32>(in, 2);
  put<u64>(warp, in, active, [&](int l) { return u64{low[l]} | u64{high[l]} << 32; });
}
MEANING("pack.b64.b16") {
  const u16* parts[4];
  for (int k = 0; k < 4; ++k) parts[k] = warp.values<u16>(in, 1 + k);
  put<u64>(warp, in, active, [&](int l) {
    return u64{parts[0][l]} | u64{parts[1][l]} << 16 | u64{parts[2][l]} << 32 | u64{parts[3][l]} << 48;
  });
}
template <class Part, class Whole>
static void unpack(Warp& warp, const Instruction& in, u32 active) {
  constexpr int kParts = sizeof(Whole) / sizeof(Part);
  const Whole* whole = warp.values<Whole>(in, kParts);
  for (int lane : Lanes(active)) {
    const Whole value = whole[lane];
    for (int k = 0; k < kParts; ++k) warp.values<Part>(in, k)[lane] = static_cast<Part>(value >> 8 * sizeof(Part) * k);
  }
}
MEANING("unpack.b16.b32") { unpack<u16, u32>(warp, in, active); }
MEANING("unpack.b32.b64") { unpack<u32, u64>(warp, in, active); }
MEANING("unpack.b16.b64") { unpack<u16, u64>(warp, in, active); }
UNARY("truncate.b64", u32, u64, x)

// Addresses [cvta]: global ones are generic ones; shared memory and parameters have windows.
UNARY("cvta.global", u64, u64, x)
UNARY("cvta.to.global", u64, u64, x)
UNARY("cvta.shared", u64, u64, x + kSharedWindow)
UNARY("cvta.to.shared", u64, u64, x - kSharedWindow)
UNARY("cvta.param", u64, u64, x + kParameterWindow)
MEANING("nop") {}

}  // namespace ptx
