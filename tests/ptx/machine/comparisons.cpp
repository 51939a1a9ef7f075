// Predicates [9.7.6 Comparison and Selection Instructions; 9.3 Predicated Execution]: one mask for the lanes of a warp.

#include "meaning.h"
#include "numbers.h"

namespace ptx {

static void set(Warp& warp, const Instruction& in, u32 active, u32 value) {
  warp.set_predicate(in.operand[0], active, value);
}
MEANING("mov.pred") { set(warp, in, active, warp.predicate(in, 1)); }
MEANING("not.pred") { set(warp, in, active, ~warp.predicate(in, 1)); }
MEANING("and.pred") { set(warp, in, active, warp.predicate(in, 1) & warp.predicate(in, 2)); }
MEANING("or.pred") { set(warp, in, active, warp.predicate(in, 1) | warp.predicate(in, 2)); }
MEANING("xor.pred") { set(warp, in, active, warp.predicate(in, 1) ^ warp.predicate(in, 2)); }

#define SELECTION(T, type)                                                                        \
  MEANING("selp." type) {                                                                         \
    const T *yes = warp.values<T>(in, 1), *no = warp.values<T>(in, 2);                            \
    const u32 which = warp.predicate(in, 3);                                                      \
    put<T>(warp, in, active, [&](int lane) { return which >> lane & 1 ? yes[lane] : no[lane]; }); \
  }
SELECTION(u16, "b16")
SELECTION(u32, "b32")
SELECTION(u64, "b64")

// setp: operands p, [q = not p,] x, y, [c]; the first immediate says how c joins in.
enum Joined : s64 { kAlone, kAnd, kOr, kXor };
template <class T, class Compare>
static void compare(Warp& warp, const Instruction& in, u32 active, Compare holds) {
  const int first = in.destinations;
  const T *x = warp.values<T>(in, first), *y = warp.values<T>(in, first + 1);
  u32 yes = 0;
  for (int lane = 0; lane < kWarp; ++lane) yes |= u32{holds(x[lane], y[lane])} << lane;
  u32 no = ~yes;
  if (in.immediate[0] != kAlone) {
    const u32 other = warp.predicate(in, first + 2);
    const auto join = [&](u32 value) {
      return in.immediate[0] == kAnd ? value & other : in.immediate[0] == kOr ? value | other : value ^ other;
    };
    yes = join(yes);
    no = join(no);
  }
  set(warp, in, active, yes);
  if (first > 1) warp.set_predicate(in.operand[1], active, no);
}

#define COMPARISON(T, type, name, holds)                                  \
  MEANING("setp." name "." type) {                                        \
    compare<T>(warp, in, active, [](T x, T y) -> bool { return holds; }); \
  }
#define ORDERED(T, type, value)                   \
  COMPARISON(T, type, "eq", value(x) == value(y)) \
  COMPARISON(T, type, "lt", value(x) < value(y))  \
  COMPARISON(T, type, "le", value(x) <= value(y)) \
  COMPARISON(T, type, "gt", value(x) > value(y))  \
  COMPARISON(T, type, "ge", value(x) >= value(y)) \
  COMPARISON(T, type, "ne", value(x) < value(y) || value(x) > value(y))
#define SAME(x) x
ORDERED(s16, "s16", SAME)
ORDERED(u16, "u16", SAME)
ORDERED(u16, "b16", SAME)
ORDERED(s32, "s32", SAME)
ORDERED(u32, "u32", SAME)
ORDERED(u32, "b32", SAME)
ORDERED(s64, "s64", SAME)
ORDERED(u64, "u64", SAME)
ORDERED(u64, "b64", SAME)
// Of floating point those are false with a NaN, these true.
#define UNORDERED(T, type, value)                                           \
  ORDERED(T, type, value)                                                   \
  COMPARISON(T, type, "equ", !(value(x) < value(y) || value(x) > value(y))) \
  COMPARISON(T, type, "neu", !(value(x) == value(y)))                       \
  COMPARISON(T, type, "ltu", !(value(x) >= value(y)))                       \
  COMPARISON(T, type, "leu", !(value(x) > value(y)))                        \
  COMPARISON(T, type, "gtu", !(value(x) <= value(y)))                       \
  COMPARISON(T, type, "geu", !(value(x) < value(y)))                        \
  COMPARISON(T, type, "num", value(x) == value(x) && value(y) == value(y))  \
  COMPARISON(T, type, "nan", value(x) != value(x) || value(y) != value(y))
UNORDERED(float, "f32", SAME)
UNORDERED(double, "f64", SAME)
UNORDERED(u16, "f16", from_f16)
UNORDERED(u16, "bf16", from_bf16)

}  // namespace ptx
