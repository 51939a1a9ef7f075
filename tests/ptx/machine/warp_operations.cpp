// What the lanes of a warp do together: shfl, vote, redux, match, elect, bar.warp.sync, setmaxnreg. The scheduler has
// made sure that all members are there.

#include "meaning.h"
#include "numbers.h"

namespace ptx {

// Operands: destination [, predicate], value, lane or distance, clamp and segment, members. Immediate: mode
// [shfl.sync].
MEANING("shfl") {
  enum { kUp, kDown, kButterfly, kIndex };
  const int first = in.destinations;
  const u32 *values = warp.values<u32>(in, first), *distance = warp.values<u32>(in, first + 1);
  const u32* limits = warp.values<u32>(in, first + 2);
  u32 results[kWarp], in_range = 0;
  for (int lane : Lanes(active)) {
    const u32 by = distance[lane] & 31, segment = limits[lane] >> 8 & 31, clamp = limits[lane] & 31;
    const s32 most = (lane & segment) | (clamp & ~segment);
    s32 from;
    bool inside;
    switch (in.immediate[0]) {
      case kUp:
        from = lane - static_cast<s32>(by);
        inside = from >= most;
        break;
      case kDown:
        from = lane + by;
        inside = from <= most;
        break;
      case kButterfly:
        from = lane ^ by;
        inside = from <= most;
        break;
      default:
        from = (lane & segment) | (by & ~segment);
        inside = from <= most;
    }
    if (!inside) from = lane;
    if (!(active >> from & 1)) machine.report("shfl from an inactive lane", warp, in, lane, from);
    results[lane] = values[from];
    in_range |= u32{inside} << lane;
  }
  for (int lane : Lanes(active)) warp.values<u32>(in, 0)[lane] = results[lane];
  if (first > 1) warp.set_predicate(in.operand[1], active, in_range);
  machine.counts[kSHUFFLES] += count_lanes(active);
}

static u32 votes(Warp& warp, const Instruction& in, u32 active) { return warp.predicate(in, 1) & active; }
static void decide(Warp& warp, const Instruction& in, u32 active, bool result) {
  warp.set_predicate(in.operand[0], active, result ? kAllLanes : 0);
}
MEANING("vote.any") { decide(warp, in, active, votes(warp, in, active) != 0); }
MEANING("vote.all") { decide(warp, in, active, votes(warp, in, active) == active); }
MEANING("vote.uni") {
  const u32 cast = votes(warp, in, active);
  decide(warp, in, active, cast == active || cast == 0);
}
MEANING("vote.ballot") {
  const u32 cast = votes(warp, in, active);
  put<u32>(warp, in, active, [&](int) { return cast; });
}

#define REDUCTION(T, name, start, combined)           \
  MEANING("redux." name) {                            \
    const T* values = warp.values<T>(in, 1);          \
    T x = start;                                      \
    for (int lane : Lanes(active)) {                  \
      const T y = values[lane];                       \
      x = combined;                                   \
    }                                                 \
    put<T>(warp, in, active, [&](int) { return x; }); \
  }
REDUCTION(u32, "add.s32", 0, x + y)
REDUCTION(u32, "add.u32", 0, x + y)
REDUCTION(s32, "min.s32", INT32_MAX, std::min(x, y))
REDUCTION(s32, "max.s32", INT32_MIN, std::max(x, y))
REDUCTION(u32, "min.u32", ~0u, std::min(x, y))
REDUCTION(u32, "max.u32", 0, std::max(x, y))
REDUCTION(u32, "and.b32", ~0u, x& y)
REDUCTION(u32, "or.b32", 0, x | y)
REDUCTION(u32, "xor.b32", 0, x ^ y)
REDUCTION(float, "min.f32", canonical_nan(), minimum(x, y))
REDUCTION(float, "max.f32", canonical_nan(), maximum(x, y))

MEANING("match.any.b32") {
  const u32* values = warp.values<u32>(in, 1);
  put<u32>(warp, in, active, [&](int lane) {
    u32 same = 0;
    for (int other : Lanes(active)) same |= u32{values[other] == values[lane]} << other;
    return same;
  });
}
MEANING("elect") {
  const u32 leader = first_lane(active);
  if (in.operand[0] >= 0) put<u32>(warp, in, active, [&](int) { return leader; });
  warp.set_predicate(in.operand[1], active, 1u << leader);
}
MEANING("activemask") {
  put<u32>(warp, in, active, [&](int) { return active; });
}
MEANING("bar.warp") { ++warp.syncs; }
MEANING("trap") { machine.fail("trap", warp, in, first_lane(active), 0); }

// Registers of a thread, from a pool of what the kernel began with. Immediates: how many, whether more [setmaxnreg].
MEANING("setmaxnreg") {
  const s64 wanted = in.immediate[0];
  const bool more = in.immediate[1];
  if (active != kAllLanes) return machine.fail("setmaxnreg by part of a warp", warp, in, 0, 0);
  if (wanted < 24 || wanted > 256 || wanted % 8) {
    return machine.fail("setmaxnreg: 24 to 256 in steps of 8", warp, in, 0, wanted);
  }
  if (!machine.register_limit) return machine.report("setmaxnreg in a kernel without maxnreg", warp, in, 0, wanted);
  if (more ? wanted < warp.register_limit : wanted > warp.register_limit) {
    machine.report("setmaxnreg in the wrong direction", warp, in, 0, wanted);
  }
  const s64 missing = (wanted - warp.register_limit) * kWarp;
  if (missing > machine.registers_free) {
    warp.repeats = warp.yields = true;
    warp.wait_pc = in.pc;
    warp.failed_waits = warp.wait_change == machine.changes ? warp.failed_waits + 1 : 1;
    warp.wait_change = machine.changes;
    return;
  }
  warp.failed_waits = 0;
  machine.registers_free -= missing;
  warp.register_limit = wanted;
  if (missing) ++machine.changes;
  const std::size_t n = warp.register_changes.size();
  warp.register_changes.push_back({wanted, in.pc});
  const int first = warp.id & ~3;
  for (int k = first; k < std::min(machine.warp_count, first + 4); ++k) {
    const auto& theirs = machine.warps[k].register_changes;
    if (theirs.size() > n && theirs[n].first != wanted) {
      machine.report("warps of a warp group disagree in setmaxnreg", warp, in, 0, wanted);
    }
  }
}

}  // namespace ptx
