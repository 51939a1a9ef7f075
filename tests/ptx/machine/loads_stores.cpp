// ld, st, atom and red [9.7.9 Data Movement and Conversion Instructions; 9.7.13 Parallel Synchronization and
// Communication Instructions: atom, red].

#include "checks.h"
#include "meaning.h"
#include "numbers.h"

namespace ptx {

// Immediates: offset and width of the address, space, elements, bytes of an element, bytes of its register, whether
// it is signed, and a mask of the bytes that are used (0: all).
enum Immediate { kOffset, kAddressWidth, kSpace, kElements, kElementBytes, kRegisterWidth, kSigned, kUsed };
enum Space : s64 { kGeneric, kGlobal, kShared };

// The addresses of a request, and which lanes go to global and to shared memory.
struct Request {
  u64 address[kWarp];
  u32 global = 0, shared = 0;

  Request(Warp& warp, const Instruction& in, u32 active, int operand) {
    for (int lane : Lanes(active)) {
      u64 at = warp.address(in, operand, lane);
      bool to_shared = in.immediate[kSpace] == kShared;
      if (in.immediate[kSpace] == kGeneric && in_shared_window(at)) {
        at -= kSharedWindow;
        to_shared = true;
      }
      (to_shared ? shared : global) |= 1u << lane;
      address[lane] = at;
    }
  }

  void count(Machine& machine, const Instruction& in, u32 bytes, bool store) const {
    if (global) {
      machine.counts[store ? kGLOBAL_STORES : kGLOBAL_LOADS] += 1;
      machine.counts[store ? kGLOBAL_STORE_BYTES : kGLOBAL_LOAD_BYTES] += bytes * count_lanes(global);
      machine.counts[store ? kGLOBAL_STORE_SECTORS : kGLOBAL_LOAD_SECTORS] += count_sectors(address, global);
    }
    if (shared) {
      u64 wavefronts = 0, least = 0;
      count_wavefronts(address, shared, bytes, wavefronts, least);
      machine.counts[store ? kSHARED_STORES : kSHARED_LOADS] += 1;
      machine.counts[store ? kSHARED_STORE_BYTES : kSHARED_LOAD_BYTES] += bytes * count_lanes(shared);
      machine.counts[store ? kSHARED_STORE_WAVEFRONTS : kSHARED_LOAD_WAVEFRONTS] += wavefronts;
      machine.counts[store ? kSHARED_STORE_LEAST : kSHARED_LOAD_LEAST] += least;
      machine.wavefronts[in.pc] += wavefronts;
      machine.least_wavefronts[in.pc] += least;
    }
  }
};

// A register may be wider than what is loaded into it [9.4.1 Operand Size Exceeding Instruction-Type Size].
static void set_register(Warp& warp, const Instruction& in, int operand, int lane, const u8* from) {
  const s64 bytes = in.immediate[kElementBytes];
  u64 value = 0;
  std::memcpy(&value, from, bytes);
  if (in.immediate[kSigned]) {
    const int shift = 64 - 8 * bytes;
    value = static_cast<u64>(static_cast<s64>(value << shift) >> shift);
  }
  switch (in.immediate[kRegisterWidth]) {
    case 2:
      warp.values<u16>(in, operand)[lane] = value;
      break;
    case 4:
      warp.values<u32>(in, operand)[lane] = value;
      break;
    default:
      warp.values<u64>(in, operand)[lane] = value;
  }
}

// Operands: destinations, address.
MEANING("ld") {
  const int elements = in.immediate[kElements], width = in.immediate[kElementBytes];
  const u64 used = in.immediate[kUsed];
  const u32 bytes = elements * width;
  const Request request(warp, in, active, elements);
  u8 data[kWarp][32];
  for (int lane : Lanes(active)) {
    const u64 at = request.address[lane];
    if (request.global >> lane & 1) {
      const u8* place = global_place(machine, warp, in, lane, at, bytes, false);
      if (!place) return;
      check_global(machine, warp, in, lane, at, bytes, Access::kRead);
      std::memcpy(data[lane], place, bytes);
      continue;
    }
    if (!shared_in_bounds(machine, warp, in, lane, at, bytes, false)) return;
    if (used == 0) {
      check_shared(machine, warp, in, lane, at, bytes, Access::kRead);
    } else {
      for (int k = 0; k < elements; ++k) {
        if (used >> k * width & ((1ull << width) - 1)) {
          check_shared(machine, warp, in, lane, at + k * width, width, Access::kRead);
        }
      }
    }
    std::memcpy(data[lane], machine.shared_at(at), bytes);
  }
  for (int lane : Lanes(active)) {
    for (int k = 0; k < elements; ++k) {
      if (in.operand[k] >= 0) set_register(warp, in, k, lane, data[lane] + k * width);
    }
  }
  request.count(machine, in, bytes, false);
}

// Operands: address, values.
MEANING("st") {
  const int elements = in.immediate[kElements], width = in.immediate[kElementBytes];
  const u32 bytes = elements * width;
  const Request request(warp, in, active, 0);
  for (int lane : Lanes(active)) {
    u8 data[32];
    for (int k = 0; k < elements; ++k) {
      std::memcpy(data + k * width, warp.values<u8>(in, 1 + k) + lane * in.immediate[kRegisterWidth], width);
    }
    const u64 at = request.address[lane];
    if (request.global >> lane & 1) {
      u8* place = global_place(machine, warp, in, lane, at, bytes, true);
      if (!place) return;
      check_global(machine, warp, in, lane, at, bytes, Access::kWrite, data);
      std::memcpy(place, data, bytes);
    } else {
      if (!shared_in_bounds(machine, warp, in, lane, at, bytes, true)) return;
      check_shared(machine, warp, in, lane, at, bytes, Access::kWrite, false, data);
      std::memcpy(machine.shared_at(at), data, bytes);
    }
  }
  request.count(machine, in, bytes, true);
}

static bool load_parameter(Machine& machine, Warp& warp, const Instruction& in, u32 active, u64 at) {
  const int elements = in.immediate[kElements], width = in.immediate[kElementBytes];
  if (at + elements * width > machine.parameters.size()) {
    machine.fail("parameter out of bounds", warp, in, first_lane(active), at);
    return false;
  }
  for (int k = 0; k < elements; ++k) {
    for (int lane : Lanes(active)) set_register(warp, in, k, lane, machine.parameters.data() + at + k * width);
  }
  return true;
}
// Operands: destinations, and with a register the address.
MEANING("ld.param") { load_parameter(machine, warp, in, active, in.immediate[kOffset]); }
MEANING("ld.param.indirect") {
  for (int lane : Lanes(active)) {
    if (!load_parameter(machine, warp, in, 1u << lane, warp.address(in, in.immediate[kElements], lane))) return;
  }
}

// Operands: [destination,] address, b [, c]. Immediates as above, but: 5 whether it has a destination, 6 what it does.
enum AtomicImmediate { kHasDestination = 5, kOperation = 6 };
enum Operation : s64 {
  kAdd,
  kMaxUnsigned,
  kMinUnsigned,
  kMaxSigned,
  kMinSigned,
  kAnd,
  kOr,
  kXor,
  kExchange,
  kCas,
  kAddFloat
};

static u64 combined(s64 operation, u64 old, u64 b, u64 c, bool narrow) {
  const s64 signed_old = narrow ? s64{s32(old)} : s64(old), signed_b = narrow ? s64{s32(b)} : s64(b);
  switch (operation) {
    case kAdd:
      return old + b;
    case kMaxUnsigned:
      return std::max(old, b);
    case kMinUnsigned:
      return std::min(old, b);
    case kMaxSigned:
      return std::max(signed_old, signed_b);
    case kMinSigned:
      return std::min(signed_old, signed_b);
    case kAnd:
      return old & b;
    case kOr:
      return old | b;
    case kXor:
      return old ^ b;
    case kExchange:
      return b;
    case kCas:
      return old == b ? c : old;
    default:
      return bits_of(float_of(u32(old)) + float_of(u32(b)));
  }
}

MEANING("atom") {
  const int width = in.immediate[kElementBytes], has_destination = in.immediate[kHasDestination];
  const Request request(warp, in, active, has_destination);
  for (int lane : Lanes(active)) {
    const u64 at = request.address[lane];
    u8* place;
    if (request.shared >> lane & 1) {
      if (!shared_in_bounds(machine, warp, in, lane, at, width, true)) return;
      if (machine.shadow(at).write_epoch < machine.cta_epoch) {
        machine.report("read of uninitialised shared memory", warp, in, lane, at);
      }
      check_shared(machine, warp, in, lane, at, width, Access::kAtomic);
      place = machine.shared_at(at);
    } else {
      place = global_place(machine, warp, in, lane, at, width, true);
      if (!place) return;
      check_global(machine, warp, in, lane, at, width, Access::kAtomic);
    }
    const auto operand = [&](int k) {
      u64 value = 0;
      std::memcpy(&value, warp.values<u8>(in, has_destination + k) + lane * width, width);
      return value;
    };
    u64 old = 0;
    std::memcpy(&old, place, width);
    const u64 c = in.immediate[kOperation] == kCas ? operand(2) : 0;
    const u64 value = combined(in.immediate[kOperation], old, operand(1), c, width == 4);
    std::memcpy(place, &value, width);
    if (has_destination) std::memcpy(warp.values<u8>(in, 0) + lane * width, &old, width);
  }
  machine.counts[kATOMICS] += count_lanes(active);
}

}  // namespace ptx
