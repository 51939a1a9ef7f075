// tcgen05.mma and tcgen05.commit [9.7.16 TensorCore 5th Generation Family Instructions], of one block: M = 64 or 128
// by N by 16 elements of 16 bits, or by 8 of tf32, summed in float32.
//
// One thread issues them; they are over when an mbarrier, to which the thread has committed them, says so at some
// later time. Until then the sum is in flight: its cells hold NaN and may not be touched, nor may operands in shared
// or tensor memory be written. The same thread's next product into the same sum follows without a wait
// [9.7.16.6.2 Pipelined tcgen05 Instructions].

#include <array>

#include "checks.h"
#include "matrix_descriptors.h"
#include "mbarriers.h"
#include "meaning.h"
#include "numbers.h"
#include "tensor_memory.h"

namespace ptx {

// Operands: address of d; descriptor of a or its address; descriptor of b; instruction descriptor; whether d is added
// to (a predicate). Immediates: offset of d's address, whether a is in tensor memory, offset of its address, tf32.
enum Immediate { kSumOffset, kAInTensorMemory, kAOffset, kTf32 };
constexpr int kMostRows = 128, kMostColumns = 256, kMostDepth = 16, kMostPieces = 2;  // pieces: of 16 bytes along K

namespace {

// [9.7.16.4.2 Instruction Descriptor]
struct Shape {
  int rows, columns;
  s64 a_type, b_type;
  bool negated, transpose_a, transpose_b;
  const char* wrong = nullptr;

  Shape(u32 bits, bool tf32)
      : rows((bits >> 24 & 31) << 4),
        columns((bits >> 17 & 63) << 3),
        a_type(bits >> 7 & 7),
        b_type(bits >> 10 & 7),
        negated((bits >> 13 & 1) != (bits >> 14 & 1)),
        transpose_a(bits >> 15 & 1),
        transpose_b(bits >> 16 & 1) {
    if (bits & 0xe080004f) wrong = "tcgen05.mma: sparse, saturating, shifted or reserved bits of its descriptor";
    if ((bits >> 4 & 3) != 1) wrong = "tcgen05.mma: sums that are not float32";
    const bool known = tf32 ? a_type == 2 && b_type == 2 : a_type < 2 && b_type < 2;
    if (!known) wrong = "tcgen05.mma: types of its descriptor are not those of its kind";
    if (tf32 && (transpose_a || transpose_b)) wrong = "tcgen05.mma: tf32 that is not K-major";
    const bool fits = columns >= 8 && columns <= kMostColumns && (rows == 64 || (rows == 128 && columns % 16 == 0));
    if (!fits) wrong = "tcgen05.mma: M must be 64 or 128, N up to 256 a multiple of 8 or 16";
  }
};

// [9.7.16.4.1 Shared Memory Descriptor]; -1: not known here.
int swizzle_of(u64 bits) {
  static constexpr int kSwizzles[] = {kNoSwizzle, -1, kSwizzle128, -1, kSwizzle64, -1, kSwizzle32, -1};
  return (bits >> 46 & 0x7fff) == 1 ? kSwizzles[bits >> 61] : -1;
}

// Which lane a row is in [9.7.16, Data Path Layout Organization: layouts D and F]: 64 rows fill half of each quarter.
int lane_of(int rows, int first, int row) { return rows == 128 ? row : first + row / 16 * 32 + row % 16; }

bool lanes_fit(int rows, int first) { return rows == 128 ? first == 0 : first == 0 || first == 16; }

class Product {
 public:
  Product(Machine& machine, Warp& warp, const Instruction& in, TensorMemory& memory, int thread)
      : machine_(machine),
        warp_(warp),
        in_(in),
        memory_(memory),
        thread_(thread),
        tf32_(in.immediate[kTf32]),
        depth_(tf32_ ? 8 : 16),
        bits_(warp.values<u32>(in, 3)[thread]),
        shape_(bits_, tf32_),
        to_(warp.values<u32>(in, 0)[thread] + u32(in.immediate[kSumOffset])) {}

  void run() {
    if (shape_.wrong) return machine_.fail(shape_.wrong, warp_, in_, thread_, bits_);
    if (!lanes_fit(shape_.rows, to_.lane)) return fail("tcgen05.mma: lane of the sum", to_);
    if (!memory_.holds(to_.column, shape_.columns)) return fail("tensor memory that is not allocated", to_);
    const bool a_is_there = in_.immediate[kAInTensorMemory] ? read_a_from_tensor_memory() : read_a();
    if (!a_is_there || !read_b()) return;
    begin_sum();
    for (int row = 0; row < shape_.rows; ++row) {
      float* sum = memory_.sums[lane_of(shape_.rows, to_.lane, row)] + to_.column;
      for (int k = 0; k < depth_; ++k) {
        const float left = shape_.negated ? -a_[row][k] : a_[row][k];
        for (int column = 0; column < shape_.columns; ++column) {
          sum[column] = __builtin_fmaf(left, b_[k][column], sum[column]);
        }
      }
    }
    for (u32 address : operands_.shared) {
      for (u32 k = 0; k < 16; k += 2) ++machine_.shadow(address + k).wgmma_reads;
    }
    TensorMemory::OfWarp& own = memory_.warps[warp_.id];
    own.mmas[thread_].push_back(std::move(operands_));
    own.mma_pc = in_.pc;
    machine_.counts[kTCGEN05_MMA] += 1;
    machine_.counts[kTCGEN05_MMA_FLOP] += 2ull * shape_.rows * shape_.columns * depth_;
    const int a_bytes = in_.immediate[kAInTensorMemory] ? 0 : shape_.rows * 32;
    machine_.counts[kTCGEN05_MMA_SHARED_BYTES] += a_bytes + shape_.columns * 32;
  }

 private:
  void fail(const char* what, TensorAddress at) {
    machine_.fail(what, warp_, in_, thread_, u32(at.lane) << 16 | at.column);
  }

  // The elements of 16 bytes, each given to `put` with its place among them.
  template <class Put>
  bool fetch(u64 address, s64 type, Put put) {
    address &= 0x3ffff;
    if (!shared_in_bounds(machine_, warp_, in_, thread_, address, 16, false)) return false;
    check_shared(machine_, warp_, in_, thread_, address, 16, Access::kRead, true);
    operands_.shared.push_back(address);
    const u8* bytes = machine_.shared_at(address);
    for (int e = 0; e < 16 / element_bytes(); ++e) put(e, number(bytes + e * element_bytes(), type));
    return true;
  }

  int element_bytes() const { return tf32_ ? 4 : 2; }
  float number(const u8* bytes, s64 type) const {
    u32 bits = 0;
    std::memcpy(&bits, bytes, element_bytes());
    return tf32_ ? float_of(bits & ~0x1fffu) : element(bits, type);  // tf32: the lower bits are not looked at
  }

  // Elements of a matrix of `lines` by K, each given to put(line, k, element).
  template <class Put>
  bool read(int operand, int lines, bool transposed, s64 type, Put put) {
    const u64 bits = warp_.values<u64>(in_, operand)[thread_];
    const int swizzle = swizzle_of(bits);
    if (swizzle < 0) {
      machine_.fail("tcgen05.mma: a matrix descriptor that is wrong or not known", warp_, in_, thread_, bits);
      return false;
    }
    const MatrixDescriptor at(bits, swizzle);
    const int in_a_piece = 16 / element_bytes();
    if (transposed) {
      for (int k = 0; k < depth_; ++k) {
        for (int piece = 0; piece < lines / 8; ++piece) {
          if (!fetch(at.mn_major(k, piece), type, [&](int e, float x) { put(piece * 8 + e, k, x); })) return false;
        }
      }
      return true;
    }
    for (int line = 0; line < lines; ++line) {
      for (int piece = 0; piece < kMostPieces; ++piece) {
        const auto put_piece = [&](int e, float x) { put(line, piece * in_a_piece + e, x); };
        if (!fetch(at.k_major(line, piece), type, put_piece)) return false;
      }
    }
    return true;
  }

  bool read_a() {
    return read(1, shape_.rows, shape_.transpose_a, shape_.a_type, [&](int row, int k, float x) { a_[row][k] = x; });
  }
  bool read_b() {
    return read(2, shape_.columns, shape_.transpose_b, shape_.b_type,
                [&](int column, int k, float x) { b_[k][column] = x; });
  }

  // A row is in a lane, from its first column on; elements of 16 bits are two to a column.
  bool read_a_from_tensor_memory() {
    const TensorAddress at(warp_.values<u32>(in_, 1)[thread_] + u32(in_.immediate[kAOffset]));
    constexpr int kColumns = 8;
    if (!lanes_fit(shape_.rows, at.lane) || shape_.transpose_a) {
      fail("tcgen05.mma: lane of A, or A in tensor memory is transposed", at);
      return false;
    }
    if (!memory_.holds(at.column, kColumns)) {
      fail("tensor memory that is not allocated", at);
      return false;
    }
    for (int row = 0; row < shape_.rows; ++row) {
      const int lane = lane_of(shape_.rows, at.lane, row);
      const u8* bytes = reinterpret_cast<const u8*>(memory_.values[lane] + at.column);
      for (int k = 0; k < depth_; ++k) a_[row][k] = number(bytes + k * element_bytes(), shape_.a_type);
      if (row % kCellLanes) continue;
      for (int column = at.column; column < at.column + kColumns; ++column) {
        TensorCell& cell = memory_.cell(lane, column);
        check_tensor_read(machine_, warp_, in_, cell, u32(lane) << 16 | column, true);
        ++cell.mma_reads;
        operands_.read.push_back(&cell);
      }
    }
    return true;
  }

  // Makes sums of what is to be added to, or of zeros.
  void begin_sum() {
    const bool adds = warp_.predicate(in_, 4) >> thread_ & 1;
    const u64 sum = u64(warp_.id * kWarp + thread_ + 1) << 32 | u64(to_.lane / 16) << 31 |
                    u64(shape_.rows / 128) << 30 | u64(tf32_) << 29 | u64(shape_.columns) << 16 | u64(to_.column);
    operands_.column = to_.column;
    operands_.columns = shape_.columns;
    operands_.lane_count = shape_.rows / kCellLanes;
    for (int part = 0; part < operands_.lane_count; ++part) {
      const int first = lane_of(shape_.rows, to_.lane, part * kCellLanes);
      operands_.lanes[part] = first;
      for (int column = to_.column; column < to_.column + shape_.columns; ++column) {
        TensorCell& cell = memory_.cell(first, column);
        const bool follows = cell.mma_sums && cell.sum == sum;
        if (!follows) {
          const u32 address = u32(first) << 16 | column;
          check_tensor_write(machine_, warp_, in_, cell, address);
          if (adds) check_tensor_read(machine_, warp_, in_, cell, address, true);
          cell.sum = sum;
        }
        ++cell.mma_sums;
        for (int lane = first; lane < first + kCellLanes; ++lane) {
          if (!adds) {
            memory_.sums[lane][column] = 0.0f;
          } else if (!follows) {
            memory_.sums[lane][column] = float_of(memory_.values[lane][column]);
          }
          memory_.values[lane][column] = ~0u;
        }
      }
    }
  }

  Machine& machine_;
  Warp& warp_;
  const Instruction& in_;
  TensorMemory& memory_;
  const int thread_;
  const bool tf32_;
  const int depth_;
  const u32 bits_;
  const Shape shape_;
  const TensorAddress to_;
  PendingMma operands_;
  float a_[kMostRows][kMostDepth];
  alignas(64) float b_[kMostDepth][kMostColumns];
};

}  // namespace

MEANING("tcgen05.mma") {
  TensorMemory* memory = tensor_memory_of(machine, warp, in);
  if (!memory) return;
  if (count_lanes(active) != 1) {
    return machine.fail("tcgen05.mma by more than one thread of a warp", warp, in, first_lane(active), 0);
  }
  Product(machine, warp, in, *memory, first_lane(active)).run();
}

// Operand: address of the mbarrier. Immediates: its offset and width.
MEANING("tcgen05.commit") {
  TensorMemory* memory = tensor_memory_of(machine, warp, in);
  if (!memory) return;
  if (count_lanes(active) != 1) {
    return machine.fail("tcgen05.commit by more than one thread of a warp", warp, in, first_lane(active), 0);
  }
  const int lane = first_lane(active);
  u64 address = warp.address(in, 0, lane);
  if (in_shared_window(address)) address -= kSharedWindow;
  if (!find_mbarrier(machine, warp, in, lane, address)) return;
  TensorMemory::OfWarp& own = memory->warps[warp.id];
  if (own.clock < 0) {
    if (machine.copy_clocks_used == kMostCopyClocks) {
      return machine.fail("more than 32 mbarriers with TMA and warps with tcgen05.mma", warp, in, lane, address);
    }
    own.clock = machine.copy_clocks_used++;
  }
  own.last_due = std::max(own.last_due, machine.instructions_done + machine.random() % machine.tma_delay);
  memory->commits.push_back({own.last_due, u32(address), warp.id, lane, in.pc, std::move(own.mmas[lane])});
  own.mmas[lane].clear();
}

// What was committed is over, for the checks of later accesses too, and the mbarrier has an arrival.
static void complete_commit(Machine& machine, std::size_t which) {
  TensorMemory& memory = *machine.tensor_memory;
  const PendingCommit commit = std::move(memory.commits[which]);
  memory.commits.erase(memory.commits.begin() + which);
  Warp& warp = machine.warps[commit.warp];
  const Instruction& in = machine.code[commit.pc];
  const int counter = memory.warps[commit.warp].clock, entry = kMostWarps + counter;
  const u32 clock = ++machine.copy_clocks[counter];
  for (const PendingMma& mma : commit.mmas) {
    for (u32 address : mma.shared) {
      for (u32 k = 0; k < 16; k += 2) {
        Shadow& shadow = machine.shadow(address + k);
        --shadow.wgmma_reads;
        shadow.mma_reader = entry;
        shadow.mma_read_clock = clock;
      }
    }
    for (TensorCell* cell : mma.read) {
      --cell->mma_reads;
      cell->mma_reader = entry;
      cell->mma_read_clock = clock;
    }
    for (int part = 0; part < mma.lane_count; ++part) {
      const int first = mma.lanes[part];
      for (int column = mma.column; column < mma.column + mma.columns; ++column) {
        TensorCell& cell = memory.cell(first, column);
        if (--cell.mma_sums) continue;
        for (int lane = first; lane < first + kCellLanes; ++lane) {
          memory.values[lane][column] = bits_of(memory.sums[lane][column]);
        }
        cell.written = true;
        cell.writer = entry;
        cell.write_clock = clock;
      }
    }
  }
  Mbarrier* mbarrier = find_mbarrier(machine, warp, in, commit.lane, commit.mbarrier);
  if (!mbarrier) return;
  if (mbarrier->pending < 1) {
    return machine.fail("mbarrier: more arrivals than its count", warp, in, commit.lane, commit.mbarrier);
  }
  --mbarrier->pending;
  mbarrier->arriving.at[entry] = clock;
  ++machine.changes;
  complete_phase(machine, *mbarrier);
}

void deliver_commits(Machine& machine) {
  if (!machine.tensor_memory) return;
  const std::vector<PendingCommit>& commits = machine.tensor_memory->commits;
  for (std::size_t k = 0; k < commits.size() && !machine.failed();) {
    if (commits[k].due <= machine.instructions_done) {
      complete_commit(machine, k);
    } else {
      ++k;
    }
  }
}

bool complete_next_commit(Machine& machine) {
  if (!machine.tensor_memory || machine.tensor_memory->commits.empty()) return false;
  complete_commit(machine, 0);  // those of a warp end in turn
  return true;
}

}  // namespace ptx
