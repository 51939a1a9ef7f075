// tcgen05.alloc, dealloc, relinquish_alloc_permit, ld, st, wait and fence [9.7.16 TensorCore 5th Generation Family
// Instructions].
//
// ld and st are asynchronous: until the wait, cells that are loaded may not be written, and those that are stored to
// may not be touched. Order between warps is by vector clocks.
//
// A kernel that has any tcgen05.fence is held to the letter of the ISA: both sides of an access by two warps need one,
// and registers that are loaded hold NaN and may not be touched before the wait. Triton 3.9's kernels have none, and
// LLVM moves reads of those registers in front of the wait; ptxas, which knows the registers, is trusted with that.

#include "tensor_memory.h"

#include <cstdio>

#include "checks.h"
#include "meaning.h"

namespace ptx {

bool TensorMemory::holds(int column, int columns) const {
  for (int end = column + columns; column < end; ++column) {
    const auto has = [&](const Allocation& a) { return column >= a.column && column < a.column + a.columns; };
    if (!std::any_of(allocations.begin(), allocations.end(), has)) return false;
  }
  return true;
}

TensorMemory* tensor_memory_of(Machine& machine, const Warp& warp, const Instruction& in) {
  if (!machine.tensor_memory) machine.fail("tensor memory is used, and none was ever allocated", warp, in, 0, 0);
  return machine.tensor_memory.get();
}

static const Clock& known(const TensorMemory& memory, const Warp& warp) {
  return memory.fences ? memory.warps[warp.id].fenced : warp.clock;
}

// Whether the warp knows that the last write of the cell is over.
static bool write_is_known(const TensorMemory& memory, const Warp& warp, const TensorCell& cell) {
  if (cell.writer == warp.id) return true;
  if (cell.write_clock > known(memory, warp).at[cell.writer]) return false;
  return !memory.fences || cell.writer >= kMostWarps ||
         memory.warps[cell.writer].before_fences > cell.write_fence;  // a commit fences by itself
}

void check_tensor_read(Machine& machine, const Warp& warp, const Instruction& in, const TensorCell& cell, u32 address,
                       bool by_mma) {
  if (cell.mma_sums) {
    machine.report("tensor memory is read, the sum of a tcgen05.mma in flight", warp, in, 0, address);
  } else if (cell.stored_to) {
    machine.report("tensor memory is read before tcgen05.wait::st", warp, in, 0, address);
  } else if (!cell.written) {
    const char* what = "read of tensor memory that was never written";
    by_mma ? machine.report(what, warp, in, 0, address) : machine.note(what, warp, in, 0, address);
  } else if (!write_is_known(*machine.tensor_memory, warp, cell)) {
    machine.report(cell.writer >= kMostWarps ? "tensor memory race (read of a sum whose mbarrier was not waited for)"
                                             : "tensor memory race (read of unsynchronised write)",
                   warp, in, 0, address);
  }
}

void check_tensor_write(Machine& machine, const Warp& warp, const Instruction& in, const TensorCell& cell,
                        u32 address) {
  const TensorMemory& memory = *machine.tensor_memory;
  if (cell.mma_sums || cell.mma_reads) {
    machine.report(cell.mma_sums ? "tensor memory is written, the sum of a tcgen05.mma in flight"
                                 : "tensor memory is written, an operand of a tcgen05.mma in flight",
                   warp, in, 0, address);
  } else if (cell.stored_to) {
    machine.report("tensor memory is written again before tcgen05.wait::st", warp, in, 0, address);
  } else if (cell.loads) {
    machine.report("tensor memory is written before tcgen05.wait::ld", warp, in, 0, address);
  } else if (cell.written && !write_is_known(memory, warp, cell)) {
    machine.report("tensor memory race (two writes)", warp, in, 0, address);
  }
  const int quarter = TensorAddress(address).lane / kWarp;
  const Clock& clock = known(memory, warp);
  bool unknown = cell.mma_read_clock > clock.at[cell.mma_reader];
  for (int k = 0; k < kWarpsOfAQuarter; ++k) {
    const int reader = 4 * k + quarter;
    unknown |= reader != warp.id && cell.last_read[k] > clock.at[reader];
  }
  if (unknown) machine.report("tensor memory race (write after unsynchronised read)", warp, in, 0, address);
}

void mark_tensor_written(TensorMemory& memory, const Warp& warp, TensorCell& cell) {
  cell.written = true;
  cell.writer = warp.id;
  cell.write_clock = warp.clock.at[warp.id];
  cell.write_fence = memory.warps[warp.id].before_fences;
}

static void tensor_fence(Machine& machine, Warp& warp, const Instruction& in, u32) {
  if (!machine.tensor_memory) return;  // nothing is there to be ordered
  TensorMemory::OfWarp& own = machine.tensor_memory->warps[warp.id];
  if (in.immediate[0]) {
    own.fenced = warp.clock;
  } else {
    ++own.before_fences;
  }
}
// Immediate: whether after_thread_sync.
static const Registration tensor_fence_registered("tcgen05.fence", tensor_fence);

// Allocation [9.7.16, tcgen05.alloc]. The highest columns that are free: an address is seldom 0, as it may be on a GPU.
//
// Operand: address in shared memory. Immediates: its offset and width, columns.
MEANING("tcgen05.alloc") {
  if (active != kAllLanes) return machine.fail("tcgen05.alloc by part of a warp", warp, in, 0, 0);
  const int columns = in.immediate[2];
  if (columns < 32 || columns > kTensorColumns || (columns & (columns - 1))) {
    return machine.fail("tcgen05.alloc: columns must be a power of two, 32 to 512", warp, in, 0, columns);
  }
  if (!machine.tensor_memory) {
    machine.tensor_memory = std::make_unique<TensorMemory>();
    const auto is_fence = [](const Instruction& other) { return other.meaning == tensor_fence; };
    machine.tensor_memory->fences = std::any_of(machine.code.begin(), machine.code.end(), is_fence);
  }
  TensorMemory& memory = *machine.tensor_memory;
  if (!memory.may_allocate) machine.report("tcgen05.alloc after tcgen05.relinquish_alloc_permit", warp, in, 0, columns);
  const auto taken = [&](int at) {
    for (int column = at; column < at + columns; ++column) {
      if (memory.holds(column, 1)) return true;
    }
    return false;
  };
  int column = kTensorColumns - columns;
  while (column >= 0 && taken(column)) column -= 32;
  if (column < 0) return machine.fail("tcgen05.alloc would wait for columns to be freed", warp, in, 0, columns);
  memory.allocations.push_back({column, columns, warp.id, in.pc});
  const u64 address = warp.address(in, 0, 0);
  if (!shared_in_bounds(machine, warp, in, 0, address, 4, true)) return;
  check_shared(machine, warp, in, 0, address, 4, Access::kWrite);
  const u32 result = column;
  std::memcpy(machine.shared_at(address), &result, 4);
}

// Operand: address. Immediate: columns. It waits for nothing: all accesses must be over.
MEANING("tcgen05.dealloc") {
  if (active != kAllLanes) return machine.fail("tcgen05.dealloc by part of a warp", warp, in, 0, 0);
  TensorMemory* memory = tensor_memory_of(machine, warp, in);
  if (!memory) return;
  const u32 address = warp.values<u32>(in, 0)[0];
  const int columns = in.immediate[0];
  const auto found = std::find_if(memory->allocations.begin(), memory->allocations.end(), [&](const auto& each) {
    return u32(each.column) == address && each.columns == columns;
  });
  if (found == memory->allocations.end()) {
    return machine.fail("tcgen05.dealloc of what was not allocated", warp, in, 0, address);
  }
  if (found->warp != warp.id) machine.note("tcgen05.dealloc by another warp than allocated", warp, in, 0, address);
  for (int lane = 0; lane < kTensorLanes; lane += kCellLanes) {
    for (int column = found->column; column < found->column + columns; ++column) {
      TensorCell& cell = memory->cell(lane, column);
      check_tensor_write(machine, warp, in, cell, u32(lane) << 16 | column);
      cell = TensorCell();
    }
  }
  for (auto& row : memory->values) std::memset(row + found->column, 0xFF, 4 * columns);
  memory->allocations.erase(found);
}

MEANING("tcgen05.relinquish_alloc_permit") {
  if (active != kAllLanes) return machine.fail("tcgen05.relinquish_alloc_permit by part of a warp", warp, in, 0, 0);
  if (TensorMemory* memory = tensor_memory_of(machine, warp, in)) memory->may_allocate = false;
}

// Loads and stores [9.7.16.2.3 Data Movement Shape]: of 32 lanes, or of 16, from the address on.
//
// Immediates: offset of the address, registers, shape, columns between the halves of 16x32bx2.
enum Immediate { kOffset, kRegisters, kShape, kSplit };
enum MoveShape { k32x32b, k16x64b, k16x128b, k16x256b, k16x32bx2 };  // as Python numbers them

namespace {

struct Tile {
  TensorMemory* memory;
  int lane, column, registers, shape, split;

  int lanes() const { return shape == k32x32b ? 32 : 16; }
  // Where register r of a thread is.
  int lane_of(int thread, int r) const {
    switch (shape) {
      case k32x32b:
        return lane + thread;
      case k16x64b:
        return lane + thread / 4 + thread % 2 * 8;
      case k16x128b:
        return lane + thread / 4 + r % 2 * 8;
      case k16x256b:
        return lane + thread / 4 + r / 2 % 2 * 8;
      default:
        return lane + thread % 16;
    }
  }
  int column_of(int thread, int r) const {
    switch (shape) {
      case k32x32b:
        return column + r;
      case k16x64b:
        return column + thread / 2 % 2 + r * 2;
      case k16x128b:
        return column + thread % 4 + r / 2 * 4;
      case k16x256b:
        return column + thread % 4 * 2 + r % 2 + r / 4 * 8;
      default:
        return column + r + thread / 16 * split;
    }
  }
  // Calls of(cell, address) for each cell, once.
  template <class Of>
  void each_cell(Of of) const {
    const int columns = registers * kWarp / lanes(), half = shape == k16x32bx2 ? columns / 2 : columns;
    for (int first = lane; first < lane + lanes(); first += kCellLanes) {
      for (int k = 0; k < columns; ++k) {
        const int at = column + k + (k >= half ? split - half : 0);
        of(memory->cell(first, at), u32(first) << 16 | at);
      }
    }
  }
};

// What an instruction accesses, or a tile without memory: it may not.
Tile tile_of(Machine& machine, Warp& warp, const Instruction& in, u32 active, int address_operand) {
  Tile tile{tensor_memory_of(machine, warp, in),
            0,
            0,
            int(in.immediate[kRegisters]),
            int(in.immediate[kShape]),
            int(in.immediate[kSplit])};
  if (!tile.memory) return tile;
  const auto refuse = [&](const char* why, u32 address) {
    machine.fail(why, warp, in, 0, address);
    tile.memory = nullptr;
    return tile;
  };
  const u32* addresses = warp.values<u32>(in, address_operand);
  const u32 bits = addresses[0] + u32(in.immediate[kOffset]);
  if (active != kAllLanes) return refuse("tcgen05.ld or st by part of a warp", bits);
  if (std::any_of(addresses, addresses + kWarp, [&](u32 other) { return other != addresses[0]; })) {
    return refuse("tcgen05.ld or st: addresses differ in a warp", bits);
  }
  const TensorAddress at(bits);
  tile.lane = at.lane;
  tile.column = at.column;
  const int quarter = warp.id % 4 * kWarp;
  if (at.lane < quarter || at.lane + tile.lanes() > quarter + kWarp || at.lane % tile.lanes()) {
    return refuse("tensor memory outside of the warp's quarter of lanes", bits);
  }
  const int columns = tile.column_of(kWarp - 1, tile.registers - 1) + 1 - at.column;
  if (!tile.memory->holds(at.column, columns)) {
    return refuse("tensor memory that is not allocated", bits);
  }
  return tile;
}

}  // namespace

// Operands: registers, address.
MEANING("tcgen05.ld") {
  const Tile tile = tile_of(machine, warp, in, active, in.immediate[kRegisters]);
  if (!tile.memory) return;
  TensorMemory::OfWarp& own = tile.memory->warps[warp.id];
  tile.each_cell([&](TensorCell& cell, u32 address) {
    check_tensor_read(machine, warp, in, cell, address, false);
    ++cell.loads;
    own.loaded.push_back(&cell);
  });
  for (int r = 0; r < tile.registers; ++r) {
    if (in.operand[r] < 0) continue;
    TensorLoad load{in.operand[r], {}};
    for (int t = 0; t < kWarp; ++t) load.values[t] = tile.memory->values[tile.lane_of(t, r)][tile.column_of(t, r)];
    if (tile.memory->fences) {
      std::memset(warp.registers + load.place, 0xFF, kRegisterBytes);
      warp.register_state[load.place / kRegisterBytes] = kLoadInFlight;
      own.loads.push_back(load);
    } else {
      std::memcpy(warp.registers + load.place, load.values, kRegisterBytes);
    }
  }
  warp.loads_in_flight = tile.memory->fences;
}

// Operands: address, registers.
MEANING("tcgen05.st") {
  const Tile tile = tile_of(machine, warp, in, active, 0);
  if (!tile.memory) return;
  TensorMemory::OfWarp& own = tile.memory->warps[warp.id];
  tile.each_cell([&](TensorCell& cell, u32 address) {
    check_tensor_write(machine, warp, in, cell, address);
    cell.stored_to = true;
    own.stored.push_back(&cell);
  });
  for (int r = 0; r < tile.registers; ++r) {
    const u32* values = warp.values<u32>(in, 1 + r);
    for (int t = 0; t < kWarp; ++t) tile.memory->values[tile.lane_of(t, r)][tile.column_of(t, r)] = values[t];
  }
}

MEANING("tcgen05.wait::ld") {
  if (active != kAllLanes) return machine.fail("tcgen05.wait by part of a warp", warp, in, 0, 0);
  TensorMemory* memory = tensor_memory_of(machine, warp, in);
  if (!memory) return;
  TensorMemory::OfWarp& own = memory->warps[warp.id];
  for (const TensorLoad& load : own.loads) {
    std::memcpy(warp.registers + load.place, load.values, kRegisterBytes);
    warp.register_state[load.place / kRegisterBytes] = kFree;
  }
  for (TensorCell* cell : own.loaded) {
    --cell->loads;
    cell->last_read[warp.id / 4] = warp.clock.at[warp.id];
  }
  own.loads.clear();
  own.loaded.clear();
  warp.loads_in_flight = false;
}

MEANING("tcgen05.wait::st") {
  if (active != kAllLanes) return machine.fail("tcgen05.wait by part of a warp", warp, in, 0, 0);
  TensorMemory* memory = tensor_memory_of(machine, warp, in);
  if (!memory) return;
  TensorMemory::OfWarp& own = memory->warps[warp.id];
  for (TensorCell* cell : own.stored) {
    cell->stored_to = false;
    mark_tensor_written(*memory, warp, *cell);
  }
  own.stored.clear();
}

void check_tensor_memory_at_end(Machine& machine) {
  if (!machine.tensor_memory) return;
  const TensorMemory& memory = *machine.tensor_memory;
  for (const auto& each : memory.allocations) {
    machine.report("block ends without tcgen05.dealloc", machine.warps[each.warp], machine.code[each.pc], 0,
                   each.column);
  }
  for (const PendingCommit& commit : memory.commits) {
    machine.report("block ends with a tcgen05.commit in flight", machine.warps[commit.warp], machine.code[commit.pc],
                   commit.lane, commit.mbarrier);
  }
  for (int id = 0; id < machine.warp_count; ++id) {
    const TensorMemory::OfWarp& own = memory.warps[id];
    for (const auto& mmas : own.mmas) {
      if (mmas.empty()) continue;
      machine.report("block ends with a tcgen05.mma that was not committed", machine.warps[id],
                     machine.code[own.mma_pc], 0, mmas[0].column);
    }
  }
}

}  // namespace ptx
