// bar, barrier and mbarrier [9.7.13 Parallel Synchronization and Communication Instructions].
//
// A warp's clock advances when it arrives somewhere; whoever waits learns the clocks of all that arrived.

#include <cstdio>

#include "checks.h"
#include "mbarriers.h"
#include "meaning.h"

namespace ptx {

// Named barriers. Immediates: number, threads (-1: all).
bool arrive_at_barrier(Machine& machine, Warp& warp, const Instruction& in) {
  NamedBarrier& barrier = machine.barriers[in.immediate[0]];
  const s64 count = in.immediate[1];
  if (count > 0 && count % kWarp) {
    machine.fail("barrier count not a multiple of 32", warp, in, 0, count);
    return false;
  }
  if (barrier.threads && barrier.count != count) {
    char more[100];
    std::snprintf(more, sizeof more, "barrier %d: %lld threads here, %lld of those who wait", (int)in.immediate[0],
                  (long long)count, (long long)barrier.count);
    machine.fail("barrier with two counts", warp, in, 0, 0, more);
    return false;
  }
  barrier.count = count;
  barrier.threads += kWarp;
  barrier.warps |= 1u << warp.id;
  barrier.clock.join(warp.clock);
  barrier.pc = in.pc;
  ++warp.clock.at[warp.id];
  ++warp.syncs;
  ++machine.changes;
  return true;
}

MEANING("bar.arrive") {
  if (active != warp.alive) return machine.fail("bar.arrive by part of a warp", warp, in, 0, 0);
  arrive_at_barrier(machine, warp, in);
}

void release_barriers(Machine& machine) {
  u32 live = 0;
  for (const Warp& warp : machine.warps) {
    if (!warp.done) live |= 1u << warp.id;
  }
  for (int id = 0; id < 16; ++id) {
    NamedBarrier& barrier = machine.barriers[id];
    if (!barrier.threads) continue;
    const bool all = (barrier.warps & live) == live;
    if (barrier.count < 0 ? !all : s64{barrier.threads} < barrier.count) continue;
    if (barrier.count > 0 && s64{barrier.threads} > barrier.count) {
      return machine.fail("barrier: more threads than its count", machine.warps[0], machine.code[barrier.pc], 0,
                          barrier.threads);
    }
    for (Warp& warp : machine.warps) {
      if (!warp.at_barrier || warp.barrier != id) continue;
      warp.clock.join(barrier.clock);
      warp.at_barrier = false;
      for (LaneGroup& group : warp.groups) group.waiting = false;
    }
    if (all) ++machine.epoch;
    barrier = NamedBarrier();
    ++machine.changes;
  }
}

Mbarrier* find_mbarrier(Machine& machine, Warp& warp, const Instruction& in, int lane, u64 address, bool by_tma) {
  if (in_shared_window(address)) address -= kSharedWindow;
  const auto found = address >> 32 ? machine.mbarriers.end() : machine.mbarriers.find(u32(address));
  if (found == machine.mbarriers.end()) {
    machine.fail("mbarrier not initialised", warp, in, lane, address);
    return nullptr;
  }
  Mbarrier& mbarrier = found->second;
  if (by_tma) {
    if (machine.warps[mbarrier.warp].mbarrier_fences <= mbarrier.fence) {
      machine.report("TMA uses an mbarrier whose init was not fenced", warp, in, lane, address);
    }
  } else if (mbarrier.warp != warp.id && machine.shadow(address).write_clock > warp.clock.at[mbarrier.warp]) {
    machine.report("mbarrier used without synchronisation after its init", warp, in, lane, address);
  }
  return &mbarrier;
}

void complete_phase(Machine& machine, Mbarrier& mbarrier) {
  if (mbarrier.pending || mbarrier.bytes) return;
  ++mbarrier.phase;
  mbarrier.pending = mbarrier.expected;
  mbarrier.completed = mbarrier.arriving;
  ++machine.changes;
}

static void mark_mbarrier(Machine& machine, u32 address, bool is_one) {
  for (u32 k = 0; k < 8; k += 2) machine.shadow(address + k).mbarrier = is_one;
}

// Operands: address, count.
MEANING("mbarrier.init") {
  for (int lane : Lanes(active)) {
    const u64 address = warp.address(in, 0, lane);
    if (!shared_in_bounds(machine, warp, in, lane, address, 8, true)) return;
    if (machine.mbarriers.count(address)) machine.report("mbarrier.init of a live mbarrier", warp, in, lane, address);
    check_shared(machine, warp, in, lane, address, 8, Access::kMbarrier);
    const s64 count = warp.values<u32>(in, 1)[lane];
    if (count < 1 || count > kMostExpected) return machine.fail("mbarrier count", warp, in, lane, address);
    machine.mbarriers[address] = {u32(address), count, count, 0, 0, {}, {}, warp.id, warp.mbarrier_fences, -1, in.pc};
    mark_mbarrier(machine, address, true);
  }
}

MEANING("mbarrier.inval") {
  for (int lane : Lanes(active)) {
    const u64 address = warp.address(in, 0, lane);
    const Mbarrier* mbarrier = find_mbarrier(machine, warp, in, lane, address);
    if (!mbarrier) return;
    if (mbarrier->bytes) machine.report("mbarrier.inval with bytes expected", warp, in, lane, address);
    machine.mbarriers.erase(u32(address));
    check_shared(machine, warp, in, lane, address, 8, Access::kMbarrier);
    mark_mbarrier(machine, address, false);
  }
}

// arrive, expect_tx and arrive.expect_tx. Operands: [state,] address [, count or bytes]. Immediates: offset and width
// of the address, whether bytes are expected, whether it arrives, has a last operand, has a state, is .relaxed.
MEANING("mbarrier.arrive") {
  enum { kExpects = 2, kArrives, kHasOperand, kHasState, kRelaxed };
  const int first = in.immediate[kHasState];
  for (int lane : Lanes(active)) {
    const u64 address = warp.address(in, first, lane);
    Mbarrier* mbarrier = find_mbarrier(machine, warp, in, lane, address);
    if (!mbarrier) return;
    s64 operand = in.immediate[kHasOperand] ? warp.values<u32>(in, first + 1)[lane] : 1;
    if (first) warp.values<u64>(in, 0)[lane] = mbarrier->phase;
    if (in.immediate[kExpects]) {
      mbarrier->bytes += operand;
      if (mbarrier->bytes > kMostExpected) {
        return machine.fail("mbarrier: too many bytes expected", warp, in, lane, address);
      }
      operand = 1;
    }
    if (in.immediate[kArrives]) {
      if (mbarrier->pending < operand) {
        return machine.fail("mbarrier: more arrivals than its count", warp, in, lane, address);
      }
      mbarrier->pending -= operand;
      if (!in.immediate[kRelaxed]) mbarrier->arriving.join(warp.clock);
      complete_phase(machine, *mbarrier);
    }
    ++machine.changes;
  }
  if (in.immediate[kArrives]) ++warp.clock.at[warp.id];
}

// try_wait and test_wait. Operands: predicate, address, parity or state. Immediates: offset and width of the address,
// whether by parity. A failing wait gives the others a turn.
MEANING("mbarrier.wait") {
  const bool by_parity = in.immediate[2];
  u32 over = 0;
  for (int lane : Lanes(active)) {
    const u64 address = warp.address(in, 1, lane);
    const Mbarrier* mbarrier = find_mbarrier(machine, warp, in, lane, address);
    if (!mbarrier) return;
    const u64 phase = by_parity ? warp.values<u32>(in, 2)[lane] : warp.values<u64>(in, 2)[lane];
    if (by_parity && phase > 1) return machine.fail("mbarrier parity is neither 0 nor 1", warp, in, lane, phase);
    if (by_parity ? (mbarrier->phase & 1) != phase : mbarrier->phase > phase) {
      over |= 1u << lane;
      warp.clock.join(mbarrier->completed);
    } else {
      warp.wait_address = address;
      warp.wait_parity = phase;
      warp.wait_pc = in.pc;
    }
  }
  warp.set_predicate(in.operand[0], active, over);
  machine.counts[kWAITS] += 1;
  if ((over & active) == active) {
    warp.failed_waits = 0;
    return;
  }
  machine.counts[kWAITS_FAILED] += 1;
  warp.yields = true;
  warp.failed_waits = warp.wait_change == machine.changes ? warp.failed_waits + 1 : 1;
  warp.wait_change = machine.changes;
}

MEANING("fence.proxy.async") {
  std::copy(std::begin(warp.clock.at), std::end(warp.clock.at), warp.clock.fenced);
  ++warp.clock.at[warp.id];  // what it writes from now on is not fenced
  ++warp.mbarrier_fences;
}
MEANING("fence.mbarrier_init") { ++warp.mbarrier_fences; }
MEANING("nanosleep") { warp.yields = true; }

}  // namespace ptx
