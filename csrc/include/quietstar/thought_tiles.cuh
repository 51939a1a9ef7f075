// What the kernels of thought attention share: which rows a block has, what they see, and where results go.
#pragma once

#include "quietstar/cuda_kernels.h"
#include "quietstar/elements.cuh"
#include "quietstar/reduce.cuh"

namespace quietstar::cuda {

constexpr int kTileKeys = 64;

// What one query row sees: base keys low ... high, and thought keys own_low ... own_high of the P · T of its text,
// anchor-major. Rows of a head and keys are counted in 32 bits, to save registers; offsets in memory have 64.
struct RowSight {
  int low, high, own_low, own_high;  // high < low: none

  __device__ __forceinline__ bool sees(bool base, int key) const {
    return base ? key >= low && key <= high : key >= own_low && key <= own_high;
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
    return of_anchor(a.mask.anchors, anchor, anchor);
  }

  // The first base key of its text.
  __device__ __forceinline__ std::int64_t start(const ThoughtAttention& a, int anchor) const {
    return of_anchor(a.mask.key_start, anchor, 0);
  }

  // How many of its steps exist.
  __device__ __forceinline__ int length(const ThoughtAttention& a, int anchor) const {
    return static_cast<int>(min(of_anchor(a.mask.thought_lengths, anchor, a.thought_steps), a.thought_steps));
  }

  // With any stride between anchors, kernels spill registers.
  __device__ __forceinline__ std::int64_t of_anchor(const PerAnchor& numbers, int anchor, std::int64_t other) const {
    return numbers.data ? numbers.data[batch * numbers.batch_stride + (numbers.anchor_stride ? anchor : 0)] : other;
  }

  // The first step that has a query.
  __device__ __forceinline__ int first_step(const ThoughtAttention& a) const {
    return static_cast<int>(a.thought_steps) - steps;
  }

  // What the query of a step sees.
  __device__ __forceinline__ RowSight sight(const ThoughtAttention& a, int anchor, int step) const {
    const std::int64_t position = this->position(a, anchor);
    const int length = this->length(a, anchor);
    if (position < 0 || step >= length) return {0, -1, 0, -1};
    const std::int64_t behind = a.mask.window_from_step ? 1 + step : 0;
    const std::int64_t low = max(start(a, anchor), position + behind - a.mask.window + 1);
    const int own = anchor * static_cast<int>(a.thought_steps);
    const int own_low =
        a.mask.window_from_step && a.mask.window <= step ? step - static_cast<int>(a.mask.window) + 1 : 0;
    return {static_cast<int>(low), static_cast<int>(min(position, a.length - 1)), own + own_low,
            own + (a.mask.causal ? step : length - 1)};
  }

  __device__ __forceinline__ RowSight sight(const ThoughtAttention& a, int row) const {
    if (row >= rows) return {0, -1, 0, -1};
    return sight(a, row / (steps * group), first_step(a) + row / group % steps);
  }

  template <class T>
  __device__ __forceinline__ const T* query(const ThoughtAttention& a, int row) const {
    const int anchor = row / (steps * group), step = row / group % steps, head = kv_head * group + row % group;
    return static_cast<const T*>(a.query.data) + batch * a.query.batch_stride + head * a.query.head_stride +
           anchor * a.query.anchor_stride + step * a.query.step_stride;
  }

  // The vector of a key or of its value: of a base position, or of a step of an anchor.
  template <class T>
  __device__ __forceinline__ const T* key(const Steps& tensor, int position_or_anchor, int step) const {
    return static_cast<const T*>(tensor.data) + batch * tensor.batch_stride + kv_head * tensor.head_stride +
           position_or_anchor * tensor.anchor_stride + step * tensor.step_stride;
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
  int first_key, base_tiles, base_end;  // base keys first_key ... base_end − 1
  int first_own, own_end, begin, end;   // thought keys first_own ... own_end − 1; tiles begin ... end − 1 of both
  int first_anchor, end_anchor;         // of the rows

  // Of a tile's place: whether it is a base key or a thought key, and which; valid says whether there is one.
  struct Key {
    bool base, valid;
    int number;
  };
  __device__ __forceinline__ Key key(int tile, int place) const {
    const bool base = tile < base_tiles;
    const int number = (base ? first_key + tile * kTileKeys : first_own + (tile - base_tiles) * kTileKeys) + place;
    return {base, number < (base ? base_end : own_end), number};
  }

  // Where it lies: the base position or the anchor, and the step.
  struct Place {
    int position_or_anchor, step;
  };
  __device__ __forceinline__ Place place(const ThoughtAttention& a, const Key& key) const {
    if (key.base) return {key.number, 0};
    const int steps = static_cast<int>(a.thought_steps);
    return {key.number / steps, key.number % steps};
  }

  // Whether some row sees a key; what rows of another block see may be left out, or not.
  __device__ __forceinline__ bool seen(const ThoughtAttention& a, const AttentionHead& head, const Key& key) const {
    if (!key.valid) return false;
    if (!key.base) {  // the first query sees the earliest steps, the last query the last one that exists
      const int steps = static_cast<int>(a.thought_steps), anchor = key.number / steps;
      const RowSight sight = head.sight(a, anchor, head.first_step(a));
      return sight.own_high >= 0 && key.number >= sight.own_low && key.number - anchor * steps < head.length(a, anchor);
    }
    if (a.mask.window == ThoughtMask::kNoWindow && a.mask.key_start.anchor_stride == 0) {
      return key.number >= head.start(a, first_anchor);
    }
    // Between windows or documents there may be keys that are in none; mostly the first anchor sees a key. Of its
    // queries the first sees most.
    const std::int64_t reach = a.mask.window - (a.mask.window_from_step ? 1 + head.first_step(a) : 0);
    for (int anchor = first_anchor; anchor < end_anchor; ++anchor) {
      const std::int64_t last = head.position(a, anchor);
      if (key.number <= last && key.number > last - reach && key.number >= head.start(a, anchor) &&
          (!a.mask.thought_lengths.data || head.length(a, anchor) > head.first_step(a))) {
        return true;
      }
    }
    return false;
  }
};

// The tiles of the rows `first_row` ... `end_row` − 1, and of these the part of one split.
__device__ __forceinline__ TileList tile_list(const ThoughtAttention& a, const AttentionHead& head, int first_row,
                                              int end_row, int split) {
  struct Shared {
    int lowest[2][kMostWarps], highest[2][kMostWarps];
  };
  Shared& shared = static_shared<Shared>();
  int low[2] = {INT32_MAX, INT32_MAX}, high[2] = {-1, -1};  // of base keys, of thought keys
  for (int row = first_row + static_cast<int>(threadIdx.x); row < end_row; row += static_cast<int>(blockDim.x)) {
    const RowSight sight = head.sight(a, row);
    if (sight.high >= sight.low) {
      low[0] = min(low[0], sight.low);
      high[0] = max(high[0], sight.high);
    }
    if (sight.own_high >= sight.own_low) {
      low[1] = min(low[1], sight.own_low);
      high[1] = max(high[1], sight.own_high);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      low[i] = min(low[i], __shfl_xor_sync(kWholeWarp, low[i], distance));
      high[i] = max(high[i], __shfl_xor_sync(kWholeWarp, high[i], distance));
    }
    if (lane_number() == 0) {
      shared.lowest[i][warp_number()] = low[i];
      shared.highest[i][warp_number()] = high[i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) {
      low[i] = min(low[i], shared.lowest[i][warp]);
      high[i] = max(high[i], shared.highest[i][warp]);
    }
  }
  TileList list;
  const bool base = high[0] >= low[0], own = high[1] >= low[1];
  list.first_key = base ? low[0] / kTileKeys * kTileKeys : 0;
  list.base_end = high[0] + 1;
  list.base_tiles = base ? (list.base_end - list.first_key + kTileKeys - 1) / kTileKeys : 0;
  list.first_own = own ? low[1] : 0;
  list.own_end = high[1] + 1;
  list.first_anchor = first_row / (head.steps * head.group);
  list.end_anchor = (end_row - 1) / (head.steps * head.group) + 1;
  const std::int64_t tiles = list.base_tiles + (list.own_end - list.first_own + kTileKeys - 1) / kTileKeys;
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
    output = whole ? static_cast<T*>(a.output) + place * a.value_size : nullptr;
    split_output = whole ? nullptr : a.split_output + (split * rows + place) * a.value_size;
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

// c tanh(scale · x / c) of a product x, with c the softcap: Cephes' polynomial (Moshier) near 0, where
// 1 − 2 / (e^2y + 1) would lose digits.
__device__ __forceinline__ float capped(float product, const ThoughtMask& mask) {
  const float y = product * (mask.scale / mask.softcap), size = fabsf(y), square = y * y;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float far = 1 - 2 * reciprocal_approximate(exp2_approximate(size * (2 * kLog2E)) + 1);
  return copysignf(size < 0.625f ? p * square * size + size : far, y) * mask.softcap;
}

constexpr float kLn2 = 0.6931471805599453f;

// Running softmax of a row, in powers of two: the largest score and the sum of 2^(score − largest).
__device__ __forceinline__ float natural_log_sum(float largest, float sum) {
  return sum != 0 ? (largest + log2f(sum)) * kLn2 : -kInfinity;
}

}  // namespace quietstar::cuda
