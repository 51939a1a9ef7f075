// Shared parts of the kernels of thought attention: the rows of a block, what they see, and where results go.
#pragma once

#include "quietstar/cuda_kernels.h"
#include "quietstar/elements.cuh"
#include "quietstar/reduce.cuh"

namespace quietstar::cuda {

constexpr int kTileKeys = 64;

// Keys low ... high. They and the rows of a head are counted in 32 bits, to save registers; offsets in memory have 64.
struct alignas(8) KeyRange {
  int low, high;

  static __device__ __forceinline__ KeyRange none() { return {INT32_MAX, -1}; }

  __device__ __forceinline__ bool has(int key) const { return key >= low && key <= high; }
  __device__ __forceinline__ bool meets_tile(int first) const { return first <= high && first + kTileKeys > low; }
};

// What one query row sees: base keys, and some of the P · T thought keys of its text, in anchor-major order.
struct alignas(16) RowSight {
  KeyRange base, own;

  // A row that sees anything sees its own step.
  __device__ __forceinline__ bool nothing() const { return own.high < 0; }
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

  // The base position of an anchor; −1: it is inactive.
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
    if (position < 0 || step >= length) return {KeyRange::none(), KeyRange::none()};
    const std::int64_t behind = a.mask.window_from_step ? 1 + step : 0;
    const std::int64_t low = max(start(a, anchor), position + behind - a.mask.window + 1);
    const std::int64_t high = min(position, a.length - 1);
    const KeyRange base = low > high ? KeyRange::none() : KeyRange{static_cast<int>(low), static_cast<int>(high)};
    const int own = anchor * static_cast<int>(a.thought_steps);
    const int own_low =
        a.mask.window_from_step && a.mask.window <= step ? step - static_cast<int>(a.mask.window) + 1 : 0;
    return {base, {own + own_low, own + (a.mask.causal ? step : length - 1)}};
  }

  __device__ __forceinline__ RowSight sight(const ThoughtAttention& a, int row) const {
    if (row >= rows) return {KeyRange::none(), KeyRange::none()};
    return sight(a, row / (steps * group), first_step(a) + row / group % steps);
  }

  template <class T>
  __device__ __forceinline__ const T* query(const ThoughtAttention& a, int row) const {
    const int anchor = row / (steps * group), step = row / group % steps, head = kv_head * group + row % group;
    return static_cast<const T*>(a.query.data) + batch * a.query.batch_stride + head * a.query.head_stride +
           anchor * a.query.anchor_stride + step * a.query.step_stride;
  }

  // The vector of a key, or of its value, of a base position or of a step of an anchor.
  template <class T>
  __device__ __forceinline__ const T* key(const Steps& tensor, int position_or_anchor, int step) const {
    return static_cast<const T*>(tensor.data) + batch * tensor.batch_stride + kv_head * tensor.head_stride +
           position_or_anchor * tensor.anchor_stride + step * tensor.step_stride;
  }

  // The row's offset in tensors [B, Hq, P, S].
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
    // Later rows see more keys, so their blocks start first, and the last ones to finish are short.
    first_row = static_cast<int>(row_blocks - 1 - blockIdx.x % row_blocks) * block_rows;
    end_row = head.rows - first_row < block_rows ? head.rows : first_row + block_rows;
    split = static_cast<int>(blockIdx.x / row_blocks % splits);
    head = AttentionHead(a, blockIdx.x / row_blocks / splits);
  }
};

// A mask of bits low ... high of 64; it has at least one bit.
__device__ __forceinline__ std::uint64_t bits_between(int low, int high) {
  return ~std::uint64_t{0} << max(low, 0) & ~std::uint64_t{0} >> (63 - min(high, 63));
}

// The tiles of keys that a block takes.
struct TileList {
  int low, high, first_key, base_tiles;  // base keys low ... high, in tiles that begin with first_key
  bool gaps;                             // there may be base keys between them that no row sees
  int first_own, own_end, begin, end;    // thought keys first_own ... own_end − 1; tiles begin ... end − 1 of both
  int full_begin, full_end;              // tiles whose keys are all seen by every row that sees anything
  int first_anchor, end_anchor;          // of the rows

  // Whether a tile's place is a base key or a thought key, and which.
  struct Key {
    bool base;
    int number;
  };
  __device__ __forceinline__ Key key(int tile, int place) const {
    const bool base = tile < base_tiles;
    return {base, (base ? first_key + tile * kTileKeys : first_own + (tile - base_tiles) * kTileKeys) + place};
  }

  // Its location: the base position, or the anchor and the step.
  struct Place {
    int position_or_anchor, step;
  };
  __device__ __forceinline__ Place place(const ThoughtAttention& a, const Key& key) const {
    if (key.base) return {key.number, 0};
    const int steps = static_cast<int>(a.thought_steps);
    return {key.number / steps, key.number % steps};
  }

  // Which keys of a tile some row sees, by places; keys seen only by rows of other blocks may be included or not. All
  // lanes of a warp must call it together.
  template <bool kBase>
  __device__ __forceinline__ std::uint64_t seen(const ThoughtAttention& a, const AttentionHead& head, int tile) const {
    const int first = key(tile, 0).number;
    if (kBase && !gaps) return bits_between(low - first, high - first);
    std::uint64_t bits = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int number = first + half * kWarpSize + lane_number();
      const bool sees = kBase ? sees_base(a, head, number) : sees_thought(a, head, number);
      bits |= static_cast<std::uint64_t>(__ballot_sync(kWholeWarp, sees)) << half * kWarpSize;
    }
    return bits;
  }

  // Keys between windows or documents may be in none; usually the first anchor sees a key. Of an anchor's queries, the
  // first sees most.
  __device__ __forceinline__ bool sees_base(const ThoughtAttention& a, const AttentionHead& head, int number) const {
    const std::int64_t reach = a.mask.window - (a.mask.window_from_step ? 1 + head.first_step(a) : 0);
    for (int anchor = first_anchor; anchor < end_anchor; ++anchor) {
      const std::int64_t last = head.position(a, anchor);
      if (number <= last && number > last - reach && number >= head.start(a, anchor) &&
          (!a.mask.thought_lengths.data || head.length(a, anchor) > head.first_step(a))) {
        return true;
      }
    }
    return false;
  }

  // The first query sees the earliest steps, the last query the last one that exists.
  __device__ __forceinline__ bool sees_thought(const ThoughtAttention& a, const AttentionHead& head, int number) const {
    if (number >= own_end) return false;
    const Place at = place(a, {false, number});
    const RowSight sight = head.sight(a, at.position_or_anchor, head.first_step(a));
    return number >= sight.own.low && at.step < head.length(a, at.position_or_anchor);
  }
};

// What the rows of a block see: written by tile_list, also for rows that do not exist.
struct BlockSights {
  RowSight row[kTileRows];
};

// Finds the tiles of a block's rows, and the part of them that its split takes. A block has more threads than rows.
__device__ __forceinline__ TileList tile_list(const ThoughtAttention& a, const BlockPlace& place, int block_rows) {
  struct Shared {
    int least[3][kMostWarps], most[3][kMostWarps];
  };
  Shared& shared = static_shared<Shared>();
  // Base keys seen by all rows that see anything; base keys and thought keys that any row sees.
  int least[3] = {INT32_MAX, INT32_MAX, INT32_MAX}, most[3] = {-1, -1, -1};
  int &all_high = least[0], &low = least[1], &own_low = least[2];
  int &all_low = most[0], &high = most[1], &own_high = most[2];
  const int thread = static_cast<int>(threadIdx.x), warps = (block_rows + kWarpSize - 1) / kWarpSize;  // that have rows
  if (thread < block_rows) {
    const RowSight sight = place.head.sight(a, place.first_row + thread);
    static_shared<BlockSights>().row[thread] = sight;
    low = sight.base.low;
    high = sight.base.high;
    own_low = sight.own.low;
    own_high = sight.own.high;
    if (!sight.nothing()) {
      all_low = low;
      all_high = high;
    }
  }
  if (warp_number() < warps) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
        least[i] = min(least[i], __shfl_xor_sync(kWholeWarp, least[i], distance));
        most[i] = max(most[i], __shfl_xor_sync(kWholeWarp, most[i], distance));
      }
      if (lane_number() == 0) {
        shared.least[i][warp_number()] = least[i];
        shared.most[i][warp_number()] = most[i];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    for (int warp = 0; warp < warps; ++warp) {
      least[i] = min(least[i], shared.least[i][warp]);
      most[i] = max(most[i], shared.most[i][warp]);
    }
  }
  TileList list;
  const bool base = high >= 0, own = own_high >= 0;
  list.first_key = base ? low / kTileKeys * kTileKeys : 0;
  list.base_tiles = base ? high / kTileKeys + 1 - low / kTileKeys : 0;
  list.low = low;
  list.high = high;
  list.gaps = all_low > all_high;  // else there is a key that all rows see, and what each sees is one range
  list.first_own = own ? own_low : 0;
  list.own_end = own_high + 1;
  list.first_anchor = place.first_row / (place.head.steps * place.head.group);
  list.end_anchor = (place.end_row - 1) / (place.head.steps * place.head.group) + 1;
  const std::int64_t tiles = list.base_tiles + (list.own_end - list.first_own + kTileKeys - 1) / kTileKeys;
  list.begin = static_cast<int>(tiles * place.split / a.splits);
  list.end = static_cast<int>(tiles * (place.split + 1) / a.splits);
  const bool full = base && !list.gaps;
  list.full_begin = full ? (all_low - list.first_key + kTileKeys - 1) / kTileKeys : 0;
  list.full_end = full ? (all_high + 1 - list.first_key) / kTileKeys : 0;
  return list;
}

// Where the results of a row go; those of splits are stored separately, as float32.
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
