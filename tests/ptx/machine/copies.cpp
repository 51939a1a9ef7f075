// cp.async [9.7.9, Asynchronous copy: Non-bulk copy]: copies that are over only when their group is waited for.

#include "checks.h"
#include "meaning.h"

namespace ptx {

// Operands: destination, source [, bytes to read: the rest are zeros]. Immediates: offset and width of the
// destination's address, offset of the source's, bytes, whether there is a third operand.
enum Immediate { kOffset, kAddressWidth, kSourceOffset, kBytes, kHasReadBytes };

MEANING("cp.async") {
  const u32 bytes = in.immediate[kBytes];
  u64 from[kWarp], to[kWarp];
  u32 reading = 0;
  for (int lane : Lanes(active)) {
    from[lane] = warp.values<u64>(in, 1)[lane] + in.immediate[kSourceOffset];
    to[lane] = warp.address(in, 0, lane);
    const u32 read = in.immediate[kHasReadBytes] ? warp.values<u32>(in, 2)[lane] : bytes;
    if (read > bytes) return machine.fail("cp.async src-size > cp-size", warp, in, lane, from[lane]);
    if (!shared_in_bounds(machine, warp, in, lane, to[lane], bytes, true)) return;
    PendingCopy copy{u32(to[lane]), bytes, u32(lane), warp.copy_group[lane], {}, in.pc};
    if (read) {
      if (from[lane] % bytes) return machine.fail("misaligned global access", warp, in, lane, from[lane]);
      const u8* place = global_place(machine, warp, in, lane, from[lane], read, false);
      if (!place) return;
      check_global(machine, warp, in, lane, from[lane], read, Access::kRead);
      std::memcpy(copy.data, place, read);
      reading |= 1u << lane;
    } else if (from[lane] % bytes) {
      machine.note("cp.async of no bytes from a misaligned address", warp, in, lane, from[lane]);
    }
    begin_copy_to_shared(machine, warp, in, lane, to[lane], bytes);
    warp.copies.push_back(copy);
  }
  machine.counts[kCOPIES] += 1;
  machine.counts[kCOPY_BYTES] += bytes * count_lanes(reading);
  machine.counts[kCOPY_SECTORS] += count_sectors(from, reading);
  count_wavefronts(to, active, bytes, machine.counts[kCOPY_WAVEFRONTS], machine.counts[kCOPY_LEAST]);
}

MEANING("cp.async.commit_group") {
  for (int lane : Lanes(active)) ++warp.copy_group[lane];
}

// Those of the lanes, but for the last `pending` groups that were committed; or all, committed or not.
void complete_copies(Machine& machine, Warp& warp, u32 active, s64 pending, bool all) {
  std::size_t kept = 0;
  for (PendingCopy& copy : warp.copies) {
    const bool old = static_cast<s64>(copy.group) < static_cast<s64>(warp.copy_group[copy.lane]) - pending;
    if (!(active >> copy.lane & 1) || !(all || old)) {
      warp.copies[kept++] = copy;
      continue;
    }
    std::memcpy(machine.shared_at(copy.to), copy.data, copy.bytes);
    for (u32 k = 0; k < copy.bytes; k += 2) {
      Shadow& shadow = machine.shadow(copy.to + k);
      shadow.copy_in_flight = false;
      shadow.write_epoch = machine.epoch;
      shadow.writer = warp.id;
      shadow.writer_lane = copy.lane;
      shadow.written_by_copy = true;
      shadow.write_sync = warp.syncs;
      shadow.write_clock = warp.clock.at[warp.id];
    }
  }
  warp.copies.resize(kept);
}

// Immediates: groups that may be pending, whether instead nothing may.
MEANING("cp.async.wait_group") { complete_copies(machine, warp, active, in.immediate[0], in.immediate[1]); }

}  // namespace ptx
