#include "checks.h"

#include <cstdio>

#include "meaning.h"

namespace ptx {

static void fail_out_of_bounds(Machine& machine, const Warp& warp, const Instruction& in, int lane, u64 address,
                               u32 bytes, bool write) {
  char more[160] = "";
  u64 nearest = ~0ull;
  for (const Buffer& buffer : machine.buffers) {
    const u64 end = address + bytes;
    const u64 distance = address < buffer.low ? buffer.low - address : end > buffer.high ? end - buffer.high : 0;
    if (distance >= nearest) continue;
    nearest = distance;
    std::snprintf(more, sizeof more, "size %u; nearest buffer 0x%llx..0x%llx, %llu bytes away", bytes,
                  (unsigned long long)buffer.low, (unsigned long long)buffer.high, (unsigned long long)distance);
  }
  machine.fail(write ? "global store out of bounds" : "global load out of bounds", warp, in, lane, address, more);
}

u8* global_place(Machine& machine, const Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes,
                 bool write) {
  const auto holds = [&](const Buffer& buffer) { return address >= buffer.low && address + bytes <= buffer.high; };
  std::size_t& last = machine.last_buffer;
  if (last >= machine.buffers.size() || !holds(machine.buffers[last])) {
    const auto found = std::find_if(machine.buffers.begin(), machine.buffers.end(), holds);
    if (found == machine.buffers.end()) {
      fail_out_of_bounds(machine, warp, in, lane, address, bytes, write);
      return nullptr;
    }
    last = found - machine.buffers.begin();
  }
  if (address % bytes) {
    machine.fail("misaligned global access", warp, in, lane, address);
    return nullptr;
  }
  const Buffer& buffer = machine.buffers[last];
  if (address < buffer.view_low || address + bytes > buffer.view_high) {
    machine.note(write ? "store outside the view, inside its storage" : "load outside the view, inside its storage",
                 warp, in, lane, address);
  }
  return reinterpret_cast<u8*>(address);
}

static void check_global_read(Machine& machine, const Warp& warp, const Instruction& in, int lane, u64 address,
                              Shadow& shadow) {
  if (shadow.write_epoch >= machine.launch_epoch) {
    if (shadow.write_epoch < machine.cta_epoch) {
      machine.report("global race between blocks (read of another's write)", warp, in, lane, address);
    } else if (shadow.write_epoch == machine.epoch && shadow.writer != warp.id) {
      machine.report("global race in a block (read of unsynchronised write)", warp, in, lane, address);
    }
  }
  if (shadow.first_read_epoch < machine.launch_epoch) shadow.first_read_epoch = machine.epoch;
  if (shadow.read_epoch != machine.epoch) {
    shadow.read_epoch = machine.epoch;
    shadow.readers = 0;
  }
  shadow.readers |= 1u << warp.id;
}

static void check_global_write(Machine& machine, const Warp& warp, const Instruction& in, int lane, u64 address,
                               Shadow& shadow, bool atomic, bool wide, bool same) {
  const bool by_another_block = shadow.write_epoch < machine.cta_epoch;
  const bool by_another_warp = shadow.write_epoch == machine.epoch && shadow.writer != warp.id;
  if (shadow.write_epoch >= machine.launch_epoch && !(atomic && shadow.written_atomically)) {
    if (same && (by_another_block || by_another_warp)) {
      machine.note("the same value is written twice to global memory", warp, in, lane, address);
    } else if (by_another_block) {
      machine.report("global race between blocks (write after another's write)", warp, in, lane, address);
    } else if (by_another_warp) {
      machine.report("global race in a block (two writes)", warp, in, lane, address);
    } else if (shadow.write_epoch == machine.epoch && shadow.writer_lane != lane && shadow.write_sync == warp.syncs &&
               wide) {
      machine.note("two lanes of a warp write the same global bytes", warp, in, lane, address);
    }
  }
  if (shadow.first_read_epoch >= machine.launch_epoch && shadow.first_read_epoch < machine.cta_epoch) {
    machine.report("global race between blocks (write after another's read)", warp, in, lane, address);
  }
  if (shadow.read_epoch == machine.epoch && shadow.readers & ~(1u << warp.id)) {
    if (same) {
      machine.note("global write of the value another warp may have read already", warp, in, lane, address);
    } else {
      machine.report("global race in a block (write after unsynchronised read)", warp, in, lane, address);
    }
  }
  shadow.write_epoch = machine.epoch;
  shadow.writer = warp.id;
  shadow.writer_lane = lane;
  shadow.written_atomically = atomic;
  shadow.write_sync = warp.syncs;
}

void check_global(Machine& machine, const Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes,
                  Access access, const u8* data) {
  if (!machine.check_global) return;
  for (u32 k = 0; k < bytes; k += 2) {
    Shadow& shadow = *machine.global_shadow(address + k);
    if (shadow.tma_stores && !(access == Access::kAtomic && shadow.written_atomically)) {
      machine.report("global access where a TMA store in flight writes", warp, in, lane, address + k);
    }
    if (access == Access::kRead) {
      check_global_read(machine, warp, in, lane, address + k, shadow);
    } else {
      const bool same = data && bytes > 1 && !std::memcmp(data + k, reinterpret_cast<u8*>(address + k), 2);
      check_global_write(machine, warp, in, lane, address + k, shadow, access == Access::kAtomic, bytes > 1, same);
    }
  }
}

bool shared_in_bounds(Machine& machine, const Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes,
                      bool write) {
  if (address < kSharedBase || address + bytes > kSharedBase + u64{machine.shared_bytes}) {
    machine.fail(write ? "shared store out of bounds" : "shared load out of bounds", warp, in, lane, address);
    return false;
  }
  if (address % bytes) {
    machine.fail("misaligned shared access", warp, in, lane, address);
    return false;
  }
  return true;
}

// Whether the warp knows that the write in the shadow is over.
static bool happened_before(const Shadow& shadow, const Warp& warp) {
  return shadow.writer == warp.id || shadow.write_clock <= warp.clock.at[shadow.writer];
}

static void check_shared_read(Machine& machine, Warp& warp, const Instruction& in, int lane, u32 address,
                              const Shadow& shadow, bool by_async_proxy) {
  if (shadow.copy_in_flight) {
    machine.report("shared read of bytes with an async copy in flight", warp, in, lane, address);
  }
  const bool written = shadow.write_epoch >= machine.cta_epoch;
  if (!written) {
    machine.report("read of uninitialised shared memory", warp, in, lane, address);
  } else if (!happened_before(shadow, warp)) {
    machine.report(shadow.writer >= kMostWarps ? "shared race (read of a TMA write whose mbarrier was not waited for)"
                                               : "shared race (read of unsynchronised write)",
                   warp, in, lane, address);
  } else if (shadow.writer == warp.id && shadow.writer_lane != lane && shadow.write_sync == warp.syncs &&
             shadow.write_epoch == machine.epoch) {
    machine.note("lane reads what another lane of its warp wrote, no bar.warp.sync between", warp, in, lane, address);
  }
  if (by_async_proxy && written && shadow.writer < machine.warp_count &&
      shadow.write_clock > warp.clock.fenced[shadow.writer]) {
    // Compilers may leave out the fence behind cp.async (Triton 3.6 does): no mistake where the kernel fences at all.
    if (shadow.written_by_copy && warp.clock.fenced[warp.id]) {
      machine.note("the asynchronous proxy reads a copy by cp.async without fence.proxy.async", warp, in, lane,
                   address);
    } else {
      machine.report("the asynchronous proxy reads what was written without fence.proxy.async", warp, in, lane,
                     address);
    }
  }
}

static void check_shared_write(Machine& machine, Warp& warp, const Instruction& in, int lane, u32 address,
                               Shadow& shadow, const u32* last_read, Access access, bool wide, bool same) {
  if (shadow.copy_in_flight) {
    machine.report("shared write over bytes with an async copy in flight", warp, in, lane, address);
  }
  if (shadow.wgmma_reads) {
    machine.report("shared write over an operand of a wgmma or tcgen05.mma in flight", warp, in, lane, address);
  } else if (shadow.mma_read_clock > warp.clock.at[shadow.mma_reader]) {
    machine.report("shared race (write over an operand of a tcgen05.mma whose mbarrier was not waited for)", warp, in,
                   lane, address);
  }
  if (shadow.tma_stores) {
    machine.report("shared write over the source of a TMA store that was not waited for", warp, in, lane, address);
  }
  const bool atomic = access == Access::kAtomic;
  if (shadow.write_epoch >= machine.cta_epoch && !happened_before(shadow, warp) && wide &&
      !(atomic && shadow.written_atomically)) {
    if (same) {
      machine.note("two warps write the same value", warp, in, lane, address);
    } else {
      machine.report("shared race (two writes)", warp, in, lane, address);
    }
  }
  if (wide && !atomic) {
    for (int reader = 0; reader < machine.warp_count; ++reader) {
      if (reader == warp.id || last_read[reader] <= warp.clock.at[reader]) continue;
      if (same) {
        machine.note("write of the value another warp may have read already", warp, in, lane, address);
      } else {
        machine.report("shared race (write after unsynchronised read)", warp, in, lane, address);
      }
      break;
    }
  }
  shadow.write_epoch = machine.epoch;
  shadow.writer = warp.id;
  shadow.writer_lane = lane;
  shadow.write_sync = warp.syncs;
  shadow.written_atomically = atomic;
  shadow.written_by_copy = false;
  shadow.write_clock = warp.clock.at[warp.id];
}

void check_shared(Machine& machine, Warp& warp, const Instruction& in, int lane, u32 address, u32 bytes, Access access,
                  bool by_async_proxy, const u8* data) {
  Shadow* shadow = &machine.shadow(address);
  u32* last_read = machine.reads_of(address);
  for (u32 k = 0; k < bytes; k += 2, ++shadow, last_read += machine.warp_count) {
    if (shadow->mbarrier && access != Access::kMbarrier) {
      machine.report("ordinary access to an mbarrier", warp, in, lane, address + k);
    }
    if (access == Access::kRead) {
      check_shared_read(machine, warp, in, lane, address + k, *shadow, by_async_proxy);
      last_read[warp.id] = warp.clock.at[warp.id];
    } else {
      const bool same = data && bytes > 1 && !std::memcmp(data + k, machine.shared_at(address) + k, 2);
      check_shared_write(machine, warp, in, lane, address + k, *shadow, last_read, access, bytes > 1, same);
    }
  }
}

void begin_copy_to_shared(Machine& machine, Warp& warp, const Instruction& in, int lane, u32 address, u32 bytes) {
  check_shared(machine, warp, in, lane, address, bytes, Access::kWrite);
  std::memset(machine.shared_at(address), 0xFF, bytes);
  for (u32 k = 0; k < bytes; k += 2) machine.shadow(address + k).copy_in_flight = true;
}

void count_wavefronts(const u64* address, u32 active, u32 bytes, u64& wavefronts, u64& least) {
  const int together = bytes <= 4 ? kWarp : 128 / bytes;  // lanes: 128 bytes a pass
  u64 total = 0;
  for (int first = 0; first < kWarp; first += together) {
    u32 words[kWarp * 4];
    int count = 0;
    for (int lane = first; lane < first + together; ++lane) {
      if (!(active >> lane & 1)) continue;
      for (u32 byte = 0; byte < std::max(bytes, 4u); byte += 4)
        words[count++] = static_cast<u32>(address[lane] + byte) >> 2;
    }
    if (count == 0) continue;
    std::sort(words, words + count);
    count = std::unique(words, words + count) - words;
    int in_bank[32] = {}, most = 0;
    for (int k = 0; k < count; ++k) most = std::max(most, ++in_bank[words[k] & 31]);
    wavefronts += most;
    total += count;
  }
  least += std::max<u64>(1, (total + 31) / 32);
}

u64 count_sectors(const u64* address, u32 active) {
  u64 sectors[kWarp];
  int count = 0;
  for (int lane : Lanes(active)) sectors[count++] = address[lane] >> 5;
  std::sort(sectors, sectors + count);
  return std::unique(sectors, sectors + count) - sectors;
}

}  // namespace ptx
