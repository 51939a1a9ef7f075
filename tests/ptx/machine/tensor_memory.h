// Tensor memory of a block [9.7.16.1 Tensor Memory]: 128 lanes of 512 columns of 32 bits, allocated by columns. What
// is remembered to find mistakes, by cells: 16 lanes of a column.
#pragma once

#include "machine.h"

namespace ptx {

constexpr int kTensorLanes = 128, kTensorColumns = 512, kCellLanes = 16;
constexpr int kWarpsOfAQuarter = kMostWarps / 4;  // warps w, w + 4, ... reach the lanes of quarter w % 4

struct TensorAddress {
  int lane, column;
  explicit TensorAddress(u32 bits) : lane(bits >> 16), column(bits & 0xffff) {}
};

struct TensorCell {
  bool written = false, stored_to = false;     // stored_to: by a tcgen05.st in flight
  u16 loads = 0, mma_reads = 0, mma_sums = 0;  // of tcgen05.ld and tcgen05.mma in flight
  u8 writer = 0, mma_reader = 0;               // entries of Clock
  u32 write_clock = 0, mma_read_clock = 0, last_read[kWarpsOfAQuarter] = {};
  u32 write_fence = 0;  // the writer's count of tcgen05.fence::before_thread_sync
  u64 sum = 0;          // which sum of a thread's tcgen05.mma in flight it is part of
};

struct TensorLoad {  // a register of tcgen05.ld
  s32 place;
  u32 values[kWarp];
};

struct PendingMma {
  std::vector<u32> shared;  // addresses of 16 bytes each
  std::vector<TensorCell*> read;
  int lanes[8];  // first ones of 16, of the sum
  int lane_count, column, columns;
};

struct PendingCommit {
  u64 due;
  u32 mbarrier;
  int warp, lane;
  s32 pc;
  std::vector<PendingMma> mmas;
};

struct TensorMemory {
  struct Allocation {
    int column, columns, warp;
    s32 pc;
  };
  struct OfWarp {
    Clock fenced;                         // what the warp knew at its last tcgen05.fence::after_thread_sync
    u32 before_fences = 1;                // counts tcgen05.fence::before_thread_sync
    int clock = -1;                       // entry of Clock of its tcgen05.mma
    u64 last_due = 0;                     // of its commits
    std::vector<PendingMma> mmas[kWarp];  // of each lane, not committed
    s32 mma_pc = 0;
    std::vector<TensorLoad> loads;
    std::vector<TensorCell*> loaded, stored;
  };

  u32 values[kTensorLanes][kTensorColumns];              // NaN where nothing was written, and where a sum is in flight
  alignas(64) float sums[kTensorLanes][kTensorColumns];  // those in flight
  TensorCell cells[kTensorLanes / kCellLanes][kTensorColumns];
  OfWarp warps[kMostWarps];
  std::vector<Allocation> allocations;
  std::vector<PendingCommit> commits;
  bool may_allocate = true;
  bool fences = false;  // whether the kernel has any tcgen05.fence: see tensor_memory.cpp

  TensorMemory() { std::memset(values, 0xFF, sizeof values); }
  TensorCell& cell(int lane, int column) { return cells[lane / kCellLanes][column]; }
  // Whether all of these columns are allocated.
  bool holds(int column, int columns) const;
};

// Of an access to a cell by a warp, or by its tcgen05.mma; `address` is for the report. A load of what was never
// written is only noted: in pipelined loops Triton loads sums that it then does not use.
void check_tensor_read(Machine&, const Warp&, const Instruction&, const TensorCell&, u32 address, bool by_mma);
void check_tensor_write(Machine&, const Warp&, const Instruction&, const TensorCell&, u32 address);
// A warp has written or read a cell.
void mark_tensor_written(TensorMemory&, const Warp&, TensorCell&);
// The block's, or null and a failure: nothing was allocated.
TensorMemory* tensor_memory_of(Machine&, const Warp&, const Instruction&);

}  // namespace ptx
