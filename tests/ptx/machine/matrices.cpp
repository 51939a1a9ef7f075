// ldmatrix, stmatrix and mma.sync [9.7.14 Warp Level Matrix Multiply-Accumulate Instructions]: all lanes of a warp
// together.

#include "checks.h"
#include "meaning.h"
#include "numbers.h"

namespace ptx {

// An 8x8 matrix of 16-bit elements in registers: lane i holds two neighbours of row i / 4.
static int fragment_row(int lane) { return lane / 4; }
static int fragment_column(int lane) { return lane % 4 * 2; }

// Immediates: offset and width of the address, -, matrices, whether they are transposed.
enum Immediate { kMatrices = 3, kTransposed = 4 };

// Rows of matrix j are where lanes 8 j to 8 j + 7 say.
static bool rows_of(Machine& machine, Warp& warp, const Instruction& in, int operand, int matrix, bool write,
                    u64 (&address)[kWarp]) {
  for (int row = 0; row < 8; ++row) {
    const int lane = matrix * 8 + row;
    address[row] = warp.address(in, operand, lane);
    if (!shared_in_bounds(machine, warp, in, lane, address[row], 16, write)) return false;
  }
  return true;
}

MEANING("ldmatrix") {
  if (active != kAllLanes) return machine.fail("ldmatrix by part of a warp", warp, in, 0, 0);
  const int matrices = in.immediate[kMatrices];
  u16 elements[4][8][8];
  u64 address[kWarp], wavefronts = 0, least = 0;
  for (int j = 0; j < matrices; ++j) {
    if (!rows_of(machine, warp, in, matrices, j, false, address)) return;
    for (int row = 0; row < 8; ++row) {
      check_shared(machine, warp, in, j * 8 + row, address[row], 16, Access::kRead);
      std::memcpy(elements[j][row], machine.shared_at(address[row]), 16);
    }
    count_wavefronts(address, 0xFF, 16, wavefronts, least);
  }
  for (int j = 0; j < matrices; ++j) {
    u32* destination = warp.values<u32>(in, j);
    for (int lane = 0; lane < kWarp; ++lane) {
      const int row = fragment_row(lane), column = fragment_column(lane);
      const auto at = [&](int k) {
        return u32{in.immediate[kTransposed] ? elements[j][column + k][row] : elements[j][row][column + k]};
      };
      destination[lane] = at(0) | at(1) << 16;
    }
  }
  machine.counts[kLDMATRIX_WAVEFRONTS] += wavefronts;
  machine.counts[kLDMATRIX_LEAST] += matrices;
  machine.counts[kSHARED_LOAD_BYTES] += matrices * 128;
  machine.wavefronts[in.pc] += wavefronts;
  machine.least_wavefronts[in.pc] += matrices;
}

// Operands: address, values.
MEANING("stmatrix") {
  if (active != kAllLanes) return machine.fail("stmatrix by part of a warp", warp, in, 0, 0);
  const int matrices = in.immediate[kMatrices];
  u64 address[kWarp], wavefronts = 0, least = 0;
  for (int j = 0; j < matrices; ++j) {
    u16 elements[8][8];
    const u32* values = warp.values<u32>(in, 1 + j);
    for (int lane = 0; lane < kWarp; ++lane) {
      const int row = fragment_row(lane), column = fragment_column(lane);
      for (int k = 0; k < 2; ++k) {
        (in.immediate[kTransposed] ? elements[column + k][row] : elements[row][column + k]) =
            u16(values[lane] >> 16 * k);
      }
    }
    if (!rows_of(machine, warp, in, 0, j, true, address)) return;
    for (int row = 0; row < 8; ++row) {
      const u8* data = reinterpret_cast<u8*>(elements[row]);
      check_shared(machine, warp, in, j * 8 + row, address[row], 16, Access::kWrite, false, data);
      std::memcpy(machine.shared_at(address[row]), data, 16);
    }
    count_wavefronts(address, 0xFF, 16, wavefronts, least);
  }
  machine.counts[kSTMATRIX_WAVEFRONTS] += wavefronts;
  machine.counts[kSTMATRIX_LEAST] += matrices;
  machine.counts[kSHARED_STORE_BYTES] += matrices * 128;
  machine.wavefronts[in.pc] += wavefronts;
  machine.least_wavefronts[in.pc] += matrices;
}

// mma.m16n8kK with float32 sums [Matrix Fragments for mma.m16n8k4/k8/k16]. Operands: d (4), a, b, c (4); immediates: K,
// type. Products are summed in the order of k by fused multiply-adds; tensor cores round otherwise.
MEANING("mma") {
  if (active != kAllLanes) return machine.fail("mma by part of a warp", warp, in, 0, 0);
  const int depth = in.immediate[0];
  const s64 type = in.immediate[1];
  const bool wide = type == kMatrixTf32;
  const int a_registers = wide ? depth / 2 : depth / 4, b_registers = wide ? depth / 4 : depth / 8;
  float a[16][16], b[16][8], c[16][8];
  for (int q = 0; q < a_registers; ++q) {
    const u32* values = warp.values<u32>(in, 4 + q);
    for (int lane = 0; lane < kWarp; ++lane) {
      const int row = lane / 4 + 8 * (q & 1);
      if (wide) {
        a[row][lane % 4 + 4 * (q >> 1)] = float_of(values[lane] & ~0x1fffu);
      } else {
        for (int k = 0; k < 2; ++k) a[row][lane % 4 * 2 + 8 * (q >> 1) + k] = element(values[lane] >> 16 * k, type);
      }
    }
  }
  for (int q = 0; q < b_registers; ++q) {
    const u32* values = warp.values<u32>(in, 4 + a_registers + q);
    for (int lane = 0; lane < kWarp; ++lane) {
      if (wide) {
        b[lane % 4 + 4 * q][lane / 4] = float_of(values[lane] & ~0x1fffu);
      } else {
        for (int k = 0; k < 2; ++k) b[lane % 4 * 2 + 8 * q + k][lane / 4] = element(values[lane] >> 16 * k, type);
      }
    }
  }
  const auto sum_at = [&](int q, int lane) -> float& { return c[lane / 4 + 8 * (q >> 1)][lane % 4 * 2 + (q & 1)]; };
  for (int q = 0; q < 4; ++q) {
    const float* values = warp.values<float>(in, 4 + a_registers + b_registers + q);
    for (int lane = 0; lane < kWarp; ++lane) sum_at(q, lane) = values[lane];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      const float left = a[row][k];
      for (int column = 0; column < 8; ++column) c[row][column] = __builtin_fmaf(left, b[k][column], c[row][column]);
    }
  }
  for (int q = 0; q < 4; ++q) {
    float* destination = warp.values<float>(in, q);
    for (int lane = 0; lane < kWarp; ++lane) destination[lane] = sum_at(q, lane);
  }
  machine.counts[kMMA] += 1;
  machine.counts[kMMA_FLOP] += 2ull * 16 * 8 * depth;
}

}  // namespace ptx
