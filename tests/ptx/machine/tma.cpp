// cp.async.bulk.tensor to shared memory: a copy lands at some later time, and tells its mbarrier.

#include "tma.h"

#include "mbarriers.h"

namespace ptx {

// What the descriptor is, or false.
static bool read_descriptor(Machine& machine, const Warp& warp, const Instruction& in, int lane, u64 address,
                            TensorMap& map) {
  const u64 at = address - kParameterWindow;
  if (address < kParameterWindow || at + sizeof map > machine.parameters.size()) {
    machine.fail("TMA descriptor is not a parameter", warp, in, lane, address);
    return false;
  }
  std::memcpy(&map, machine.parameters.data() + at, sizeof map);
  if (map.magic != kTensorMapMagic || map.rank != in.immediate[kTmaRank]) {
    machine.fail("TMA descriptor of another kind or rank", warp, in, lane, address);
    return false;
  }
  if (map.base % 16) {
    machine.fail("TMA base not aligned to 16 bytes", warp, in, lane, map.base);
    return false;
  }
  for (u32 k = 1; k < map.rank; ++k) {
    if (map.stride[k] % 16 == 0) continue;
    machine.fail("TMA stride not a multiple of 16 bytes", warp, in, lane, map.stride[k]);
    return false;
  }
  if (map.swizzle && map.box[0] * map.element_bytes > 16u << map.swizzle) {
    machine.fail("TMA box wider than its swizzle", warp, in, lane, map.box[0]);
    return false;
  }
  return true;
}

bool read_tma(Machine& machine, Warp& warp, const Instruction& in, int lane, PendingTma& copy) {
  copy.shared = warp.address(in, 0, lane);
  copy.warp = warp.id;
  copy.lane = lane;
  copy.pc = in.pc;
  const u64 descriptor = warp.values<u64>(in, 1)[lane] + in.immediate[kTmaDescriptorOffset];
  if (!read_descriptor(machine, warp, in, lane, descriptor, copy.map)) return false;
  copy.bytes = copy.map.element_bytes;
  for (int k = 0; k < in.immediate[kTmaRank]; ++k) {
    copy.bytes *= copy.map.box[k];
    copy.at[k] = warp.values<s32>(in, 2 + k)[lane];
  }
  if (copy.shared % 128 || copy.shared < kSharedBase ||
      copy.shared + copy.bytes > kSharedBase + u64{machine.shared_bytes}) {
    machine.fail("TMA outside of shared memory or not aligned to 128 bytes", warp, in, lane, copy.shared);
    return false;
  }
  copy.due = machine.instructions_done + machine.random() % machine.tma_delay;
  return true;
}

MEANING("tma.load") {
  for (int lane : Lanes(active)) {
    PendingTma copy{};
    if (!read_tma(machine, warp, in, lane, copy)) return;
    copy.mbarrier = warp.address(in, 2 + in.immediate[kTmaRank], lane, in.immediate[kTmaMbarrierOffset],
                                 in.immediate[kTmaMbarrierWidth]);
    Mbarrier* mbarrier = find_mbarrier(machine, warp, in, lane, copy.mbarrier);
    if (!mbarrier || !find_mbarrier(machine, warp, in, lane, copy.mbarrier, true)) return;
    if (mbarrier->copy_clock < 0) {
      if (machine.copy_clocks_used == kMostCopyClocks) {
        return machine.fail("more than 32 mbarriers with TMA", warp, in, lane, copy.mbarrier);
      }
      mbarrier->copy_clock = machine.copy_clocks_used++;
    }
    begin_copy_to_shared(machine, warp, in, lane, copy.shared, copy.bytes);
    machine.tma.push_back(copy);
    machine.counts[kTMA_LOADS] += 1;
  }
}

// Copies 16 bytes; what lies outside the tensor is zero.
static bool load_piece(Machine& machine, Warp& warp, const PendingTma& copy, u32 column, u64 row, u8* piece) {
  const Instruction& in = machine.code[copy.pc];
  const u32 bytes = copy.map.element_bytes;
  std::memset(piece, 0, 16);
  return for_each_element(copy, column, row, [&](u64 address, u32 byte) {
    const u8* place = global_place(machine, warp, in, copy.lane, address, bytes, false);
    if (!place) return false;
    if (bytes > 1) check_global(machine, warp, in, copy.lane, address, bytes, Access::kRead);
    std::memcpy(piece + byte, place, bytes);
    machine.counts[kTMA_BYTES] += bytes;
    return true;
  });
}

void complete_tma(Machine& machine, std::size_t which) {
  const PendingTma copy = machine.tma[which];
  machine.tma.erase(machine.tma.begin() + which);
  Warp& warp = machine.warps[copy.warp];
  const Instruction& in = machine.code[copy.pc];
  Mbarrier* mbarrier = find_mbarrier(machine, warp, in, copy.lane, copy.mbarrier, true);
  if (!mbarrier) return;
  const bool done = for_each_piece(copy, [&](u64 shared, u32 column, u64 row) {
    return load_piece(machine, warp, copy, column, row, machine.shared_at(shared));
  });
  if (!done) return;
  const u32 clock = ++machine.copy_clocks[mbarrier->copy_clock];
  for (u32 k = 0; k < copy.bytes; k += 2) {
    Shadow& shadow = machine.shadow(copy.shared + k);
    shadow.copy_in_flight = false;
    shadow.write_epoch = machine.epoch;
    shadow.writer = kMostWarps + mbarrier->copy_clock;
    shadow.write_clock = clock;
    shadow.written_atomically = false;
  }
  mbarrier->arriving.at[kMostWarps + mbarrier->copy_clock] = clock;
  mbarrier->bytes -= copy.bytes;
  ++machine.changes;
  if (mbarrier->bytes < -kMostExpected) {
    return machine.fail("mbarrier: more bytes than expected", warp, in, copy.lane, copy.mbarrier);
  }
  complete_phase(machine, *mbarrier);
}

void deliver_tma(Machine& machine) {
  for (std::size_t k = 0; k < machine.tma.size() && !machine.failed();) {
    if (machine.tma[k].due <= machine.instructions_done) {
      complete_tma(machine, k);
    } else {
      ++k;
    }
  }
}

}  // namespace ptx
