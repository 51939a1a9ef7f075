// What the kernels of thought attention share: which rows a block has, what they see, and where results go.
#pragma once

#include "quietstar/cuda_kernels.h"
#include "quietstar/elements.cuh"
#include "quietstar/reduce.cuh"

namespace quietstar::cuda {

constexpr int kTileKeys = 64;

// What one query row sees: base keys low ... high, and the thought keys of its anchor up to a step. Rows of a head,
// keys and anchors are counted in 32 bits, to save registers; offsets in memory have 64.
struct RowSight {
  int anchor;     // its number; −1: no such row
  int low, high;  // high < low: none
  int last_step;  // −1: none

  __device__ __forceinline__ bool sees_base(int key) const { return key >= low && key <= high; }
  __device__ __forceinline__ bool sees_thought(int of_anchor, int step) const {
    return of_anchor == anchor && step <= last_step;
  }
};

// The rows and tensors of one batch and key/value head.
struct AttentionHead {
  int batch, kv_head, group, steps, rows;

  __device__ __forceinline__ AttentionHead(const ThoughtAttention& a, unsigned number)
      : batch(static_cast<int>(number / static_cast<unsigned>(a.kv_heads))),
        kv_head(static_cast<int>(number % static_cast<unsigned>(a.kv_heads))),
        group(static_cast<int>(a.query_heads) / static_cast<int>(a.kv_heads)),
        steps(static_cast<int>(a.steps)),
        rows(static_cast<int>(a.anchors_per_batch) * steps * group) {}

  // Of an anchor; −1: it is inactive.
  __device__ __forceinline__ std::int64_t position(const ThoughtAttention& a, int anchor) const {
    return of_anchor(a.anchors, anchor, anchor);
  }

  // The first base key of its text.
  __device__ __forceinline__ std::int64_t start(const ThoughtAttention& a, int anchor) const {
    return of_anchor(a.key_start, anchor, 0);
  }

  // With any stride between anchors, kernels spill registers.
  __device__ __forceinline__ std::int64_t of_anchor(const PerAnchor& numbers, int anchor, std::int64_t other) const {
    return numbers.data ? numbers.data[batch * numbers.batch_stride + (numbers.anchor_stride ? anchor : 0)] : other;
  }

  __device__ __forceinline__ RowSight sight(const ThoughtAttention& a, int row) const {
    if (row >= rows) return {-1, 0, -1, -1};
    const int anchor = row / (steps * group), step = row / group % steps;
    const std::int64_t position = this->position(a, anchor);
    if (position < 0) return {anchor, 0, -1, -1};
    const std::int64_t low = max(start(a, anchor), position - min(a.window, a.length) + 1);
    return {anchor, static_cast<int>(low), static_cast<int>(min(position, a.length - 1)),
            static_cast<int>(a.thought_steps) - steps + step};
  }

  template <class T>
  __device__ __forceinline__ const T* query(const ThoughtAttention& a, int row) const {
    const int anchor = row / (steps * group), step = row / group % steps, head = kv_head * group + row % group;
    return static_cast<const T*>(a.query.data) + batch * a.query.batch_stride + head * a.query.head_stride +
           anchor * a.query.anchor_stride + step * a.query.step_stride;
  }

  // Of the row in tensors [B, Hq, P, S].
  __device__ __forceinline__ std::int64_t place(const ThoughtAttention& a, int row) const {
    const int head = kv_head * group + row % group;
    return (batch * a.query_heads + head) * a.anchors_per_batch * steps + row / group;
  }
};

// The rows and the split of a block.
struct BlockPlace {
  AttentionHead head;
  int split, first_row, end_row;

  __device__ __forceinline__ BlockPlace(const ThoughtAttention& a, int block_rows) : head(a, 0) {
    const unsigned row_blocks = static_cast<unsigned>((head.rows - 1) / block_rows + 1);
    const unsigned splits = static_cast<unsigned>(a.splits);
    // Later rows see more keys: those blocks start first, so that the last to finish are short.
    first_row = static_cast<int>(row_blocks - 1 - blockIdx.x % row_blocks) * block_rows;
    end_row = head.rows - first_row < block_rows ? head.rows : first_row + block_rows;
    split = static_cast<int>(blockIdx.x / row_blocks % splits);
    head = AttentionHead(a, blockIdx.x / row_blocks / splits);
  }
};

// The tiles of keys that a block takes.
struct TileList {
  int first_key, base_tiles, base_end;         // base keys first_key ... base_end − 1
  int first_anchor, thought_keys, begin, end;  // tiles begin ... end − 1 of base and thought tiles

  // Of a tile's place: whether it is a base key or a thought key, and which; valid says whether there is one.
  struct Key {
    bool base, valid;
    int position;      // of a base key
    int anchor, step;  // of a thought key
  };
  __device__ __forceinline__ Key key(const ThoughtAttention& a, int tile, int place) const {
    if (tile < base_tiles) {
      const int position = first_key + tile * kTileKeys + place;
      return {true, position < base_end, position, 0, 0};
    }
    const int number = (tile - base_tiles) * kTileKeys + place, steps = static_cast<int>(a.thought_steps);
    return {false, number < thought_keys, 0, first_anchor + number / steps, number % steps};
  }

  // Whether some row of the block sees a key.
  __device__ __forceinline__ bool seen(const ThoughtAttention& a, const AttentionHead& head, const Key& key) const {
    if (!key.valid) return false;
    if (!key.base) return head.position(a, key.anchor) >= 0;
    if (a.window >= a.length && a.key_start.anchor_stride == 0) return key.position >= head.start(a, first_anchor);
    // Between windows or documents there may be keys that are in none; mostly the first anchor sees a key.
    const int anchors = thought_keys / static_cast<int>(a.thought_steps);
    for (int anchor = first_anchor; anchor < first_anchor + anchors; ++anchor) {
      const std::int64_t last = head.position(a, anchor);
      if (key.position <= last && key.position > last - a.window && key.position >= head.start(a, anchor)) return true;
    }
    return false;
  }
};

// The tiles of the rows `first_row` ... `end_row` − 1, and of these the part of one split.
__device__ __forceinline__ TileList tile_list(const ThoughtAttention& a, const AttentionHead& head, int first_row,
                                              int end_row, int split) {
  struct Shared {
    int low[kMostWarps], high[kMostWarps];
  };
  Shared& shared = static_shared<Shared>();
  int low = INT32_MAX, high = -1;
  for (int row = first_row + static_cast<int>(threadIdx.x); row < end_row; row += static_cast<int>(blockDim.x)) {
    const RowSight sight = head.sight(a, row);
    if (sight.high < sight.low) continue;
    low = min(low, sight.low);
    high = max(high, sight.high);
  }
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    low = min(low, __shfl_xor_sync(kWholeWarp, low, distance));
    high = max(high, __shfl_xor_sync(kWholeWarp, high, distance));
  }
  if (lane_number() == 0) {
    shared.low[warp_number()] = low;
    shared.high[warp_number()] = high;
  }
  __syncthreads();
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) {
    low = min(low, shared.low[warp]);
    high = max(high, shared.high[warp]);
  }
  TileList list;
  list.first_key = high < low ? 0 : low / kTileKeys * kTileKeys;
  list.base_end = high + 1;
  list.base_tiles = high < low ? 0 : (list.base_end - list.first_key + kTileKeys - 1) / kTileKeys;
  const int rows_of_anchor = head.steps * head.group;
  list.first_anchor = first_row / rows_of_anchor;
  list.thought_keys = ((end_row - 1) / rows_of_anchor + 1 - list.first_anchor) * static_cast<int>(a.thought_steps);
  const std::int64_t tiles = list.base_tiles + (list.thought_keys + kTileKeys - 1) / kTileKeys;
  list.begin = static_cast<int>(tiles * split / a.splits);
  list.end = static_cast<int>(tiles * (split + 1) / a.splits);
  return list;
}

// Where results of a row go: those of a split apart from those of others, as float32.
template <class T>
struct RowResult {
  T* output;
  float* split_output;
  float* lse;

  __device__ __forceinline__ RowResult(const ThoughtAttention& a, const AttentionHead& head, int row, int split) {
    const std::int64_t place = head.place(a, row);
    const std::int64_t rows = a.batch * a.query_heads * a.anchors_per_batch * a.steps;
    const bool whole = a.splits == 1;
    output = whole ? static_cast<T*>(a.output) + place * a.head_size : nullptr;
    split_output = whole ? nullptr : a.split_output + (split * rows + place) * a.head_size;
    lse = whole ? a.lse + place : a.split_lse + split * rows + place;
  }

  __device__ __forceinline__ void store(int column, float value) const {
    if (output) {
      output[column] = rounded<T>(value);
    } else {
      split_output[column] = value;
    }
  }

  // Two neighbours at once, in rows of an even number of columns.
  __device__ __forceinline__ void store_pair(int column, float first, float second) const {
    if (output) {
      cuda::store(output + column, Vector<T, 2>{{rounded<T>(first), rounded<T>(second)}});
    } else {
      cuda::store(split_output + column, Vector<float, 2>{{first, second}});
    }
  }
};

constexpr float kLn2 = 0.6931471805599453f;

// Running softmax of a row, in powers of two: the largest score and the sum of 2^(score − largest).
__device__ __forceinline__ float natural_log_sum(float largest, float sum) {
  return sum != 0 ? (largest + log2f(sum)) * kLn2 : -kInfinity;
}

}  // namespace quietstar::cuda
