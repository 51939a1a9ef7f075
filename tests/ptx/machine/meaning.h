// How the other files say what an instruction means, and the loops over lanes that they share.
#pragma once

#include <map>
#include <string>

#include "machine.h"

namespace ptx {

inline std::map<std::string, Meaning>& meanings() {
  static std::map<std::string, Meaning> table;
  return table;
}

struct Registration {
  Registration(const char* name, Meaning meaning) { meanings()[name] = meaning; }
};

#define PTX_JOIN_(a, b) a##b
#define PTX_JOIN(a, b) PTX_JOIN_(a, b)
#define PTX_MEANING_(function, name)                                                   \
  static void function(Machine&, Warp&, const Instruction&, u32);                      \
  static const Registration PTX_JOIN(function, _registered)(name, function);           \
  static void function([[maybe_unused]] Machine& machine, [[maybe_unused]] Warp& warp, \
                       [[maybe_unused]] const Instruction& in, [[maybe_unused]] u32 active)
// MEANING("name") { what the lanes of `active` do }
#define MEANING(name) PTX_MEANING_(PTX_JOIN(meaning_, __COUNTER__), name)

// for (int lane : Lanes(mask))
class Lanes {
 public:
  explicit Lanes(u32 mask) : mask_(mask) {}
  struct Iterator {
    u32 left;
    int operator*() const { return __builtin_ctz(left); }
    void operator++() { left &= left - 1; }
    bool operator!=(const Iterator& other) const { return left != other.left; }
  };
  Iterator begin() const { return {mask_}; }
  Iterator end() const { return {0}; }

 private:
  u32 mask_;
};

inline int first_lane(u32 mask) { return __builtin_ctz(mask); }
inline int count_lanes(u32 mask) { return __builtin_popcount(mask); }

// The first operand of active lanes becomes value(lane), which is computed for all.
template <class T, class Value>
inline void put(Warp& warp, const Instruction& in, u32 active, Value value) {
  T* destination = warp.values<T>(in, 0);
  T results[kWarp];
#pragma GCC ivdep
  for (int lane = 0; lane < kWarp; ++lane) results[lane] = value(lane);
  if (active == kAllLanes) {
    std::memcpy(destination, results, sizeof results);
  } else {
    for (int lane : Lanes(active)) destination[lane] = results[lane];
  }
}

// An instruction with one, two or three sources x, y, z: types of the destination and of each, then the result.
#define UNARY(name, D, X, result)                 \
  MEANING(name) {                                 \
    const X* xs = warp.values<X>(in, 1);          \
    put<D>(warp, in, active, [&](int lane) -> D { \
      const X x = xs[lane];                       \
      return static_cast<D>(result);              \
    });                                           \
  }
#define BINARY(name, D, X, Y, result)             \
  MEANING(name) {                                 \
    const X* xs = warp.values<X>(in, 1);          \
    const Y* ys = warp.values<Y>(in, 2);          \
    put<D>(warp, in, active, [&](int lane) -> D { \
      const X x = xs[lane];                       \
      const Y y = ys[lane];                       \
      return static_cast<D>(result);              \
    });                                           \
  }
#define TERNARY(name, D, X, Y, Z, result)         \
  MEANING(name) {                                 \
    const X* xs = warp.values<X>(in, 1);          \
    const Y* ys = warp.values<Y>(in, 2);          \
    const Z* zs = warp.values<Z>(in, 3);          \
    put<D>(warp, in, active, [&](int lane) -> D { \
      const X x = xs[lane];                       \
      const Y y = ys[lane];                       \
      const Z z = zs[lane];                       \
      return static_cast<D>(result);              \
    });                                           \
  }

}  // namespace ptx
