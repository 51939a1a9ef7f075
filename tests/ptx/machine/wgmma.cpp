// wgmma [9.7.15 Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions]: 64 x N x 16, a quarter of the
// rows by each of four warps.
//
// Until its group is waited for, an accumulator is in flight: its registers hold NaN and may not be touched, nor may
// the shared memory and registers that it reads be written.

#include "checks.h"
#include "matrix_descriptors.h"
#include "meaning.h"
#include "numbers.h"

namespace ptx {

// Operands: d (N / 2 registers), a (4 registers or a descriptor), descriptor of b [, scale-d].
// scale-d: 0, the sum starts anew; constant (0: the constant) or a predicate (1: the last operand).
enum Immediate { kN, kType, kAInRegisters, kScaleIsPredicate, kScale, kTransposeA, kTransposeB, kNegate };
constexpr int kDepth = 16, kMostColumns = 256;

// [9.7.15.5.1.2.2 Matrix Descriptor Format]
static MatrixDescriptor descriptor(u64 bits) { return {bits, static_cast<int>(bits >> 62)}; }

static void mark_reads(Machine& machine, const WgmmaOperands& operands, int by) {
  for (u32 address : operands.shared) {
    for (u32 k = 0; k < 16; k += 2) machine.shadow(address + k).wgmma_reads += by;
  }
}

// [wgmma.fence] It stands in front of a warp's first wgmma, and between any other access to a register and a wgmma that
// has it as accumulator or of A; wgmma itself may go on with its accumulators if the shape is the same. Of A's
// registers only writes count here: nothing can be wrong with two reads.
static void check_fences(Machine& machine, Warp& warp, const Instruction& in, bool chained, bool sums) {
  if (warp.fence_step == 0) machine.report("wgmma before the first wgmma.fence", warp, in, 0, 0);
  const s64 columns = in.immediate[kN];
  const int accumulators = columns / 2, operands = accumulators + (in.immediate[kAInRegisters] ? 4 : 0);
  const auto use = [&](int k) -> RegisterUse& { return warp.register_use[in.operand[k] / kRegisterBytes]; };
  const char* const more = sums ? "" : "(not read: scale-d is 0)";
  for (int k = 0; k < accumulators && !chained; ++k) {
    const char* kind = nullptr;
    if (use(k).written > warp.fence_step) {
      kind = "accumulator written after the last wgmma.fence";
    } else if (use(k).read > warp.fence_step) {
      kind = "accumulator read after the last wgmma.fence";
    } else if (use(k).by_wgmma > warp.fence_step && use(k).columns != columns) {
      kind = "accumulator of a wgmma of another shape after the last wgmma.fence";
    }
    if (!kind) continue;
    machine.report(kind, warp, in, 0, in.operand[k], more);
    break;
  }
  for (int k = accumulators; k < operands; ++k) {
    const bool written = use(k).written > warp.fence_step;
    if (!written && !(use(k).by_wgmma > warp.fence_step && use(k).columns)) continue;
    machine.report(written ? "A register written after the last wgmma.fence"
                           : "A register that was an accumulator after the last wgmma.fence",
                   warp, in, 0, in.operand[k]);
    break;
  }
  for (int k = 0; k < operands; ++k) {
    use(k).by_wgmma = warp.step;
    use(k).columns = k < accumulators ? columns : 0;
  }
}

// A thread has at least the accumulators in flight and the fragment of A; how many more a kernel needs only ptxas
// knows.
static void check_register_count(Machine& machine, Warp& warp, const Instruction& in) {
  s64 count = in.immediate[kAInRegisters] ? 4 : 0;
  for (const PendingWgmma& pending : warp.wgmmas) count += pending.registers.size();
  if (!machine.register_limit || count <= warp.register_limit) return;
  const std::string more = std::to_string(count) + " of " + std::to_string(warp.register_limit);
  machine.report("wgmma with more registers in flight than the warp has", warp, in, 0, 0, more.c_str());
}

static int row_of(int q, int lane) { return lane / 4 + 8 * (q >> 1 & 1); }
static int column_of(int q, int lane) { return lane % 4 * 2 + (q & 1) + 8 * (q >> 2); }

static void wgmma(Machine& machine, Warp& warp, const Instruction& in, u32 active) {
  if (active != kAllLanes) return machine.fail("wgmma by part of a warp", warp, in, 0, 0);
  const int columns = in.immediate[kN], accumulators = columns / 2, quarter = warp.id % 4;
  const s64 type = in.immediate[kType];
  const bool a_in_registers = in.immediate[kAInRegisters];
  if (type == kMatrixTf32) return machine.fail("wgmma.tf32 is not modelled", warp, in, 0, 0);

  PendingWgmma* pending = nullptr;  // into the same registers
  for (PendingWgmma& other : warp.wgmmas) {
    if (static_cast<int>(other.registers.size()) == accumulators &&
        std::equal(other.registers.begin(), other.registers.end(), in.operand)) {
      pending = &other;
    }
  }
  u32 scale = in.immediate[kScale] ? kAllLanes : 0;
  if (in.immediate[kScaleIsPredicate]) scale = warp.predicate(in, in.operands - 1);
  if (scale != 0 && scale != kAllLanes) return machine.fail("scale-d differs in a warp", warp, in, 0, 0);
  check_fences(machine, warp, in, pending != nullptr, scale);

  WgmmaOperands operands{warp.wgmma_group, {}, {}};
  float a[16][kDepth];
  alignas(64) float b[kDepth][kMostColumns];
  // Eight elements, each given to `put` with its place among them.
  const auto fetch = [&](u64 address, auto put) {
    address &= 0x3ffff;
    if (!shared_in_bounds(machine, warp, in, 0, address, 16, false)) return false;
    check_shared(machine, warp, in, 0, address, 16, Access::kRead, true);
    operands.shared.push_back(address);
    u16 elements[8];
    std::memcpy(elements, machine.shared_at(address), 16);
    for (int e = 0; e < 8; ++e) put(e, element(elements[e], type));
    return true;
  };
  if (a_in_registers) {
    for (int q = 0; q < 4; ++q) {
      const u32* values = warp.values<u32>(in, accumulators + q);
      for (int lane = 0; lane < kWarp; ++lane) {
        float* pair = &a[lane / 4 + 8 * (q & 1)][lane % 4 * 2 + 8 * (q >> 1)];
        for (int k = 0; k < 2; ++k) pair[k] = element(values[lane] >> 16 * k, type);
      }
    }
  } else {
    const MatrixDescriptor at = descriptor(warp.values<u64>(in, accumulators)[0]);
    for (int line = 0; line < 16; ++line) {
      for (int piece = 0; piece < 2; ++piece) {
        const bool good =
            in.immediate[kTransposeA]
                ? fetch(at.mn_major(line, quarter * 2 + piece), [&](int e, float x) { a[piece * 8 + e][line] = x; })
                : fetch(at.k_major(quarter * 16 + line, piece), [&](int e, float x) { a[line][piece * 8 + e] = x; });
        if (!good) return;
      }
    }
    machine.counts[kWGMMA_SHARED_BYTES] += 16 * kDepth * 2;
  }
  const MatrixDescriptor at = descriptor(warp.values<u64>(in, accumulators + (a_in_registers ? 4 : 1))[0]);
  if (in.immediate[kTransposeB]) {
    for (int k = 0; k < kDepth; ++k) {
      for (int piece = 0; piece < columns / 8; ++piece) {
        if (!fetch(at.mn_major(k, piece), [&](int e, float x) { b[k][piece * 8 + e] = x; })) return;
      }
    }
  } else {
    for (int column = 0; column < columns; ++column) {
      for (int piece = 0; piece < 2; ++piece) {
        if (!fetch(at.k_major(column, piece), [&](int e, float x) { b[piece * 8 + e][column] = x; })) return;
      }
    }
  }
  if (quarter == 0) machine.counts[kWGMMA_SHARED_BYTES] += 2ull * kDepth * columns;  // once for the four warps

  const float sign = (in.immediate[kNegate] & 1) != (in.immediate[kNegate] >> 1) ? -1.0f : 1.0f;
  alignas(64) static float c[16][kMostColumns];
  for (auto& row : c) std::fill(row, row + columns, 0.0f);
  for (int q = 0; q < accumulators && scale; ++q) {
    const float* values = pending ? &pending->values[q * kWarp] : warp.values<float>(in, q);
    for (int lane = 0; lane < kWarp; ++lane) c[row_of(q, lane)][column_of(q, lane)] = values[lane];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      const float left = sign * a[row][k];
      for (int column = 0; column < columns; ++column) {
        c[row][column] = __builtin_fmaf(left, b[k][column], c[row][column]);
      }
    }
  }

  if (!pending) {
    pending = &warp.wgmmas.emplace_back();
    pending->registers.assign(in.operand, in.operand + accumulators);
    pending->values.resize(accumulators * kWarp);
    for (s32 place : pending->registers) {
      u8& state = warp.register_state[place / kRegisterBytes];
      if (state != kFree) machine.report("wgmma over registers in flight of another shape", warp, in, 0, place);
      state = kAccumulatorInFlight;
      std::memset(warp.registers + place, 0xFF, kRegisterBytes);
    }
  }
  check_register_count(machine, warp, in);
  pending->group = warp.wgmma_group;
  for (int q = 0; q < accumulators; ++q) {
    for (int lane = 0; lane < kWarp; ++lane) {
      pending->values[q * kWarp + lane] = c[row_of(q, lane)][column_of(q, lane)];
    }
  }
  for (int k = accumulators; a_in_registers && k < accumulators + 4; ++k) {
    u8& state = warp.register_state[in.operand[k] / kRegisterBytes];
    if (state == kAccumulatorInFlight) {
      machine.report("A operand is an accumulator in flight", warp, in, 0, in.operand[k]);
    } else {
      state = kOperandInFlight;
      operands.registers.push_back(in.operand[k] / kRegisterBytes);
    }
  }
  mark_reads(machine, operands, 1);
  pending->inputs.push_back(std::move(operands));
  warp.wgmma_in_flight = true;
  machine.counts[kWGMMA] += 1;
  machine.counts[kWGMMA_FLOP] += 2ull * 16 * columns * kDepth;
}
static const Registration wgmma_registered("wgmma", wgmma);

void find_wgmma_registers(Machine& machine) {
  std::vector<bool> used(machine.register_image.size() / kRegisterBytes + 1);
  for (const Instruction& in : machine.code) {
    const int operands = in.immediate[kN] / 2 + (in.immediate[kAInRegisters] ? 4 : 0);
    for (int k = 0; in.meaning == wgmma && k < operands; ++k) used[in.operand[k] / kRegisterBytes] = true;
  }
  for (Instruction& in : machine.code) {
    in.near_wgmma = in.meaning && in.meaning != wgmma &&
                    std::any_of(in.operand, in.operand + in.operands,
                                [&](s32 place) { return place >= 0 && used[place / kRegisterBytes]; });
  }
}

void note_registers(Warp& warp, const Instruction& in) {
  for (int k = 0; k < in.operands; ++k) {
    if (in.operand[k] < 0) continue;
    RegisterUse& use = warp.register_use[in.operand[k] / kRegisterBytes];
    (k < in.destinations ? use.written : use.read) = warp.step;
  }
}

MEANING("wgmma.fence") {
  if (active != kAllLanes) return machine.fail("wgmma.fence by part of a warp", warp, in, 0, 0);
  warp.fence_step = warp.step;
}
MEANING("wgmma.commit_group") { ++warp.wgmma_group; }

// Reads end when the wgmma does, for the checks of later writes too.
static void end_reads(Machine& machine, Warp& warp, const WgmmaOperands& operands) {
  mark_reads(machine, operands, -1);
  for (u32 address : operands.shared) {
    for (u32 k = 0; k < 16; k += 2) machine.reads_of(address + k)[warp.id] = warp.clock.at[warp.id];
  }
  for (s32 place : operands.registers) warp.register_state[place] = kFree;
}

MEANING("wgmma.wait_group") {
  const s64 over = static_cast<s64>(warp.wgmma_group) - in.immediate[0];  // groups before this one
  const auto is_over = [&](u64 group) { return static_cast<s64>(group) < over; };
  std::size_t kept = 0;
  for (PendingWgmma& pending : warp.wgmmas) {
    std::size_t left = 0;
    for (WgmmaOperands& operands : pending.inputs) {
      if (is_over(operands.group)) {
        end_reads(machine, warp, operands);
      } else {
        std::swap(pending.inputs[left++], operands);
      }
    }
    pending.inputs.resize(left);
    if (!is_over(pending.group)) {
      std::swap(warp.wgmmas[kept++], pending);
      continue;
    }
    for (std::size_t q = 0; q < pending.registers.size(); ++q) {
      const s32 place = pending.registers[q];
      std::memcpy(warp.registers + place, &pending.values[q * kWarp], kRegisterBytes);
      warp.register_state[place / kRegisterBytes] = kFree;
    }
  }
  warp.wgmmas.resize(kept);
  warp.wgmma_in_flight = kept > 0;
  for (const PendingWgmma& pending : warp.wgmmas) {  // an operand may serve several
    for (const WgmmaOperands& operands : pending.inputs) {
      for (s32 place : operands.registers) warp.register_state[place] = kOperandInFlight;
    }
  }
}

void end_wgmmas(Machine& machine, Warp& warp) {
  for (const PendingWgmma& pending : warp.wgmmas) {
    for (const WgmmaOperands& operands : pending.inputs) mark_reads(machine, operands, -1);
  }
  warp.wgmmas.clear();
}

}  // namespace ptx
