// cp.async.bulk.tensor [9.7.9, Asynchronous copy: Tensor copy]: tiles of 1 to 5 dimensions to the block's own
// shared memory. A copy lands at some later time, and tells its mbarrier.

#include "checks.h"
#include "mbarriers.h"
#include "meaning.h"
#include "swizzle.h"

namespace ptx {

// Operands: destination, descriptor, coordinates (innermost first), mbarrier. Immediates: offset and width of the
// destination's address, dimensions, offset and width of the mbarrier's, offset of the descriptor's.
enum Immediate { kOffset, kAddressWidth, kRank, kMbarrierOffset, kMbarrierWidth, kDescriptorOffset };

// What the descriptor is, or false.
static bool read_descriptor(Machine& machine, const Warp& warp, const Instruction& in, int lane, u64 address,
                            TensorMap& map) {
  const u64 at = address - kParameterWindow;
  if (address < kParameterWindow || at + sizeof map > machine.parameters.size()) {
    machine.fail("TMA descriptor is not a parameter", warp, in, lane, address);
    return false;
  }
  std::memcpy(&map, machine.parameters.data() + at, sizeof map);
  if (map.magic != kTensorMapMagic || map.rank != in.immediate[kRank]) {
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

MEANING("tma.load") {
  const int rank = in.immediate[kRank];
  for (int lane : Lanes(active)) {
    PendingTma copy{};
    copy.shared = warp.address(in, 0, lane);
    copy.mbarrier = warp.address(in, 2 + rank, lane, in.immediate[kMbarrierOffset], in.immediate[kMbarrierWidth]);
    copy.warp = warp.id;
    copy.lane = lane;
    copy.pc = in.pc;
    const u64 descriptor = warp.values<u64>(in, 1)[lane] + in.immediate[kDescriptorOffset];
    if (!read_descriptor(machine, warp, in, lane, descriptor, copy.map)) return;
    copy.bytes = copy.map.element_bytes;
    for (int k = 0; k < rank; ++k) {
      copy.bytes *= copy.map.box[k];
      copy.at[k] = warp.values<s32>(in, 2 + k)[lane];
    }
    if (copy.shared % 128 || copy.shared < kSharedBase ||
        copy.shared + copy.bytes > kSharedBase + u64{machine.shared_bytes}) {
      return machine.fail("TMA destination out of bounds or not aligned to 128 bytes", warp, in, lane, copy.shared);
    }
    Mbarrier* mbarrier = find_mbarrier(machine, warp, in, lane, copy.mbarrier);
    if (!mbarrier || !find_mbarrier(machine, warp, in, lane, copy.mbarrier, true)) return;
    if (mbarrier->copy_clock < 0) {
      if (machine.copy_clocks_used == kMostCopyClocks) {
        return machine.fail("more than 32 mbarriers with TMA", warp, in, lane, copy.mbarrier);
      }
      mbarrier->copy_clock = machine.copy_clocks_used++;
    }
    begin_copy_to_shared(machine, warp, in, lane, copy.shared, copy.bytes);
    copy.due = machine.instructions_done + machine.random() % machine.tma_delay;
    machine.tma.push_back(copy);
    machine.counts[kTMA_LOADS] += 1;
  }
}

// Copies 16 bytes of a row of the box; what lies outside the tensor is zero.
static bool copy_piece(Machine& machine, Warp& warp, const PendingTma& copy, u64 row, bool inside, u32 column,
                       u8* piece) {
  const TensorMap& map = copy.map;
  std::memset(piece, 0, 16);
  if (!inside) return true;
  const Instruction& in = machine.code[copy.pc];
  for (u32 byte = 0; byte < 16; byte += map.element_bytes) {
    const s64 x = s64{copy.at[0]} + (column + byte) / map.element_bytes;
    if (x < 0 || x >= static_cast<s64>(map.size[0])) continue;
    const u64 address = row + x * map.element_bytes;
    const u8* place = global_place(machine, warp, in, copy.lane, address, map.element_bytes, false);
    if (!place) return false;
    if (map.element_bytes > 1) check_global(machine, warp, in, copy.lane, address, map.element_bytes, Access::kRead);
    std::memcpy(piece + byte, place, map.element_bytes);
    machine.counts[kTMA_BYTES] += map.element_bytes;
  }
  return true;
}

void complete_tma(Machine& machine, std::size_t which) {
  const PendingTma copy = machine.tma[which];
  machine.tma.erase(machine.tma.begin() + which);
  Warp& warp = machine.warps[copy.warp];
  const Instruction& in = machine.code[copy.pc];
  Mbarrier* mbarrier = find_mbarrier(machine, warp, in, copy.lane, copy.mbarrier, true);
  if (!mbarrier) return;
  const TensorMap& map = copy.map;
  static constexpr int kSwizzles[] = {kNoSwizzle, kSwizzle32, kSwizzle64, kSwizzle128};  // as descriptors number them
  const u32 row_bytes = map.box[0] * map.element_bytes;
  for (u32 r = 0; r < copy.bytes / row_bytes; ++r) {
    u64 row = map.base;
    bool inside = true;
    u32 rest = r;
    for (u32 k = 1; k < map.rank; ++k) {
      const s64 place = s64{copy.at[k]} + rest % map.box[k];
      rest /= map.box[k];
      inside &= place >= 0 && place < static_cast<s64>(map.size[k]);
      row += place * map.stride[k];
    }
    for (u32 column = 0; column < row_bytes; column += 16) {
      u8 piece[16];
      if (!copy_piece(machine, warp, copy, row, inside, column, piece)) return;
      const u64 to = swizzled(copy.shared + r * row_bytes + column, kSwizzles[map.swizzle]);
      std::memcpy(machine.shared_at(to), piece, 16);
    }
  }
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
