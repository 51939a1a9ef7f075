// Attention of thoughts without gradients: for a sampling step, and for decoding behind a long cache.
//
// Layout: the rows of one key/value head are (anchor, step, head of the group), anchor-major, and a block takes up to
// 128 of them, 16 a warp. Its keys come in tiles of 64: first those of the base sequence that any of its rows sees,
// then the thought keys of its anchors, anchor-major. A warp leaves out tiles in which its rows see nothing, so the
// thought keys of other warps' anchors cost it nothing but the barrier. With few rows the tiles are split over blocks,
// and a second kernel adds up the splits, in fixed order (flash-decoding).
//
// 4 · D FLOP for each row and key, on the matrix units in half precision (float32 has a kernel of its own). Each
// block reads 4 · D bytes a key; three tiles are under way, 32 KiB each at D = 128. Of a tile's row of 16-byte pieces,
// piece c lies at c ^ (row mod 8), so that the eight rows that ldmatrix takes lie in different banks.
#pragma once

#include "quietstar/cuda_kernels.h"
#include "quietstar/elements.cuh"
#include "quietstar/reduce.cuh"

namespace quietstar::cuda {

constexpr int kTileKeys = 64, kStages = 3;
constexpr int kRowsOfWarp = 16;
constexpr int kMostTileWarps = static_cast<int>(kTileRows) / kRowsOfWarp;

// What one query row sees: base keys low ... high, and the thought keys of its anchor up to a step. Rows of a head, keys
// and anchors are counted in 32 bits, to save registers; offsets in memory have 64.
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
        group(static_cast<int>(a.query_heads) / static_cast<int>(a.kv_heads)), steps(static_cast<int>(a.steps)),
        rows(static_cast<int>(a.anchors_per_batch) * steps * group) {}

  __device__ __forceinline__ RowSight sight(const ThoughtAttention& a, int row) const {
    if (row >= rows) return {-1, 0, -1, -1};
    const int anchor = row / (steps * group), step = row / group % steps;
    const std::int64_t position = a.anchors ? a.anchors[batch * a.anchor_batch_stride + anchor] : anchor;
    if (position < 0) return {anchor, 0, -1, -1};
    const std::int64_t start = a.key_start ? a.key_start[batch] : 0, high = min(position, a.length - 1);
    return {anchor, static_cast<int>(max(start, position - min(a.window, a.length) + 1)), static_cast<int>(high),
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
};

// The tiles of the rows `first_row` ... `end_row` − 1, and of these the part of one split.
__device__ __forceinline__ TileList tile_list(const ThoughtAttention& a, const AttentionHead& head,
                                              int first_row, int end_row, int split) {
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
  return sum > 0 ? (largest + log2f(sum)) * kLn2 : -kInfinity;
}

// The half-precision kernel for heads of at most kHead elements. kAligned: all keys, values and their strides are
// multiples of 16 bytes, and so is the head.
template <class T, int kHead, bool kAligned>
struct HalfAttention {
  static constexpr int kPieces = kHead / 8;  // of 16 bytes, in a row
  static constexpr int kSteps = kHead / 16;  // of the matrix units, along the head
  static constexpr int kTileBytes = kTileKeys * kHead * 2;
  static constexpr int kSharedBytes = kStages * 2 * kTileBytes;

  const ThoughtAttention& a;
  const AttentionHead& head;
  const TileList& list;
  unsigned char* const tiles;

  __device__ __forceinline__ unsigned char* stage(int tile, bool values) const {
    return tiles + ((tile % kStages) * 2 + values) * kTileBytes;
  }

  static __device__ __forceinline__ int offset(int key, int piece) {
    return key * kHead * 2 + (piece ^ (key & 7)) * 16;
  }

  // Brings keys and values of a tile to shared memory, zeros where there are none: 0 · NaN would not be 0.
  __device__ __forceinline__ void fetch(int tile) const {
    if (tile < list.end) {
      for (int i = threadIdx.x; i < kTileKeys * kPieces; i += blockDim.x) {
        const int place = i / kPieces, piece = i % kPieces;
        const TileList::Key key = list.key(a, tile, place);
        const Steps &keys = key.base ? a.key : a.thought_key, &values = key.base ? a.value : a.thought_value;
        const auto at = [&](const Steps& tensor) {
          return static_cast<const T*>(tensor.data) + head.batch * tensor.batch_stride +
                 head.kv_head * tensor.head_stride +
                 (key.base ? key.position : key.anchor) * tensor.anchor_stride + key.step * tensor.step_stride +
                 piece * 8;
        };
        copy(stage(tile, false) + offset(place, piece), keys, at, key.valid, piece);
        copy(stage(tile, true) + offset(place, piece), values, at, key.valid, piece);
      }
    }
    commit_copies();
  }

  template <class At>
  __device__ __forceinline__ void copy(unsigned char* to, const Steps& tensor, At& at, bool valid, int piece) const {
    if constexpr (kAligned) {
      const bool inside = valid && piece * 8 < a.head_size;
      copy_async(to, inside ? at(tensor) : static_cast<const T*>(tensor.data), inside);
    } else {
      Vector<T, 8> vector;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        vector.element[i] = valid && piece * 8 + i < a.head_size ? at(tensor)[i] : T{0};
      }
      store(reinterpret_cast<T*>(to), vector);
    }
  }
};

template <class T, int kHead, bool kAligned>
__global__ void __launch_bounds__(kMostTileWarps* kWarpSize) half_attention_kernel(ThoughtAttention a) {
  using Attention = HalfAttention<T, kHead, kAligned>;
  constexpr int kSteps = Attention::kSteps;
  const BlockPlace place(a, static_cast<int>(blockDim.x) / kWarpSize * kRowsOfWarp);
  const AttentionHead& head = place.head;
  const TileList list = tile_list(a, head, place.first_row, place.end_row, place.split);
  const Attention attention{a, head, list, dynamic_shared()};

  // Of the 16 rows of its warp, a lane has lane / 4 and that + 8: in the layout of the matrix units, both of queries
  // and of sums.
  const int lane = lane_number(), pair = lane % 4 * 2;
  const int upper_row = place.first_row + warp_number() * kRowsOfWarp + lane / 4, row[2] = {upper_row, upper_row + 8};
  const RowSight sight[2] = {head.sight(a, row[0]), head.sight(a, row[1])};

  for (int i = 0; i < kStages - 1; ++i) attention.fetch(list.begin + i);

  std::uint32_t query[kSteps][4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const T* from = row[r] < head.rows ? head.query<T>(a, row[r]) : nullptr;
    const auto element = [&](int column) {
      return from && column < a.head_size ? static_cast<std::uint32_t>(from[column].bits) : 0u;
    };
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = k * 16 + half * 8 + pair;
        query[k][half * 2 + r] = element(column) | element(column + 1) << 16;
      }
    }
  }

  // What all rows of the warp see, and what any of them does: most tiles need no mask, or no work.
  int low = INT32_MAX, high = -1, all_low = 0, all_high = INT32_MAX;
  int first_anchor = INT32_MAX, last_anchor = -1;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (sight[r].low <= sight[r].high) low = min(low, sight[r].low);
    high = max(high, sight[r].high);
    all_low = max(all_low, sight[r].low);
    all_high = min(all_high, sight[r].high);
    if (sight[r].last_step >= 0) {
      first_anchor = min(first_anchor, sight[r].anchor);
      last_anchor = max(last_anchor, sight[r].anchor);
    }
  }
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    low = min(low, __shfl_xor_sync(kWholeWarp, low, distance));
    high = max(high, __shfl_xor_sync(kWholeWarp, high, distance));
    all_low = max(all_low, __shfl_xor_sync(kWholeWarp, all_low, distance));
    all_high = min(all_high, __shfl_xor_sync(kWholeWarp, all_high, distance));
    first_anchor = min(first_anchor, __shfl_xor_sync(kWholeWarp, first_anchor, distance));
    last_anchor = max(last_anchor, __shfl_xor_sync(kWholeWarp, last_anchor, distance));
  }

  float output[kHead / 8][4] = {};
  float largest[2] = {kLowest, kLowest}, sum[2] = {0, 0};
  const float to_log2 = a.scale * kLog2E;

  for (int tile = list.begin; tile < list.end; ++tile) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the tile is there for all, and all are done with the one before, which the next overwrites
    attention.fetch(tile + kStages - 1);

    const bool base = tile < list.base_tiles;
    const int first_key = list.first_key + tile * kTileKeys;
    const bool needed = base ? first_key <= high && first_key + kTileKeys > low
                             : list.key(a, tile, 0).anchor <= last_anchor &&
                                   list.key(a, tile, kTileKeys - 1).anchor >= first_anchor;
    if (!needed) continue;
    const bool masked = !base || first_key < all_low || first_key + kTileKeys - 1 > all_high;

    float score[kTileKeys / 8][4] = {};
    const unsigned char* keys = attention.stage(tile, false);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int n = 0; n < kTileKeys / 16; ++n) {
        // Keys n · 16 + 0 ... 7 and 8 ... 15, of each the two halves of this step.
        std::uint32_t b[4];
        const int key = n * 16 + lane / 16 * 8 + lane % 8;
        load_matrices<false>(b, keys + Attention::offset(key, k * 2 + lane / 8 % 2));
        const std::uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        multiply_accumulate<T>(score[2 * n], query[k], first);
        multiply_accumulate<T>(score[2 * n + 1], query[k], second);
      }
    }
    float highest[2] = {largest[0], largest[1]};
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[n][i] *= to_log2;
        if (masked) {
          const TileList::Key key = list.key(a, tile, n * 8 + pair + i % 2);
          const RowSight& of_row = sight[i / 2];
          const bool sees = key.base ? of_row.sees_base(key.position)
                                     : key.valid && of_row.sees_thought(key.anchor, key.step);
          if (!sees) score[n][i] = -kInfinity;
        }
        highest[i / 2] = larger(highest[i / 2], score[n][i]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = largest_of_lanes(highest[r], 4);  // that share the row
      const float shrink = exp2_approximate(largest[r] - highest[r]);
      largest[r] = highest[r];
      sum[r] *= shrink;
#pragma unroll
      for (int n = 0; n < kHead / 8; ++n) {
        output[n][2 * r] *= shrink;
        output[n][2 * r + 1] *= shrink;
      }
    }
    const unsigned char* values = attention.stage(tile, true);
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k) {  // sixteen keys: two columns of scores are one operand
      std::uint32_t probability[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&s)[4] = score[2 * k + half];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[i] = exp2_approximate(s[i] - largest[i / 2]);
          sum[i / 2] += s[i];
        }
        probability[half * 2] = packed<T>(s[0], s[1]);
        probability[half * 2 + 1] = packed<T>(s[2], s[3]);
      }
#pragma unroll
      for (int n = 0; n < kHead / 16; ++n) {
        std::uint32_t b[4];
        load_matrices<true>(b, values + Attention::offset(k * 16 + lane % 16, n * 2 + lane / 16));
        const std::uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        multiply_accumulate<T>(output[2 * n], probability, first);
        multiply_accumulate<T>(output[2 * n + 1], probability, second);
      }
    }
  }
  wait_for_copies<0>();

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] = sum_of_lanes(sum[r], 4);
    if (row[r] >= head.rows) continue;
    const RowResult<T> result(a, head, row[r], place.split);
    const float factor = sum[r] > 0 ? 1 / sum[r] : 0;
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) {
      const int column = n * 8 + pair;
      const float first = output[n][2 * r] * factor, second = output[n][2 * r + 1] * factor;
      if (a.head_size % 2 == 0) {
        if (column < a.head_size) result.store_pair(column, first, second);
      } else {
        if (column < a.head_size) result.store(column, first);
        if (column + 1 < a.head_size) result.store(column + 1, second);
      }
    }
    if (lane % 4 == 0) *result.lse = natural_log_sum(largest[r], sum[r]);
  }
}

// float32 has no matrix units at full precision: a warp takes one row at a time, and of a tile a key each lane, then of
// the values a column each lane. Keys are read directly, those that rows share mostly from the L1 cache.
constexpr int kFloatWarps = 4, kFloatColumns = static_cast<int>(kLargestHead) / kWarpSize;

__global__ void __launch_bounds__(kFloatWarps* kWarpSize, 4) float_attention_kernel(ThoughtAttention a) {
  const BlockPlace place(a, kFloatWarps);
  const AttentionHead& head = place.head;
  const TileList list = tile_list(a, head, place.first_row, place.end_row, place.split);

  struct Shared {
    float query[kFloatWarps][kLargestHead];
  };
  const int lane = lane_number();
  float* const query = static_shared<Shared>().query[warp_number()];
  const int row = place.first_row + warp_number();
  const RowSight sight = head.sight(a, row);
  for (std::int64_t column = lane; column < a.head_size; column += kWarpSize) {
    query[column] = row < head.rows ? head.query<float>(a, row)[column] * a.scale * kLog2E : 0;
  }
  __syncwarp();

  float output[kFloatColumns] = {}, largest = kLowest, sum = 0;
  for (int part = list.begin * 2; part < list.end * 2; ++part) {
    const TileList::Key key = list.key(a, part / 2, part % 2 * kWarpSize + lane);
    const bool sees =
        key.valid && (key.base ? sight.sees_base(key.position) : sight.sees_thought(key.anchor, key.step));
    if (!__any_sync(kWholeWarp, sees)) continue;
    const auto at = [&](const Steps& of_base, const Steps& of_thought) {
      const Steps& tensor = key.base ? of_base : of_thought;
      return static_cast<const float*>(tensor.data) + head.batch * tensor.batch_stride +
             head.kv_head * tensor.head_stride + (key.base ? key.position : key.anchor) * tensor.anchor_stride +
             key.step * tensor.step_stride;
    };
    float score = -kInfinity;
    if (sees) {
      const float* const k = at(a.key, a.thought_key);
      score = 0;
      if (misalignment(k) == 0 && a.head_size % 4 == 0) {
#pragma unroll 4
        for (std::int64_t column = 0; column < a.head_size; column += 4) {
          const Vector<float, 4> some = load<4>(k + column);
#pragma unroll
          for (int i = 0; i < 4; ++i) score += some.element[i] * query[column + i];
        }
      } else {
        for (std::int64_t column = 0; column < a.head_size; ++column) score += k[column] * query[column];
      }
    }
    const float highest = larger(largest, largest_of_lanes(score));
    const float shrink = exp2_approximate(largest - highest), probability = exp2_approximate(score - highest);
    largest = highest;
    sum = sum * shrink + sum_of_lanes(probability);
#pragma unroll
    for (int i = 0; i < kFloatColumns; ++i) output[i] *= shrink;
    const std::uint64_t values = sees ? reinterpret_cast<std::uint64_t>(at(a.value, a.thought_value)) : 0;
#pragma unroll 4
    for (int other = 0; other < kWarpSize; ++other) {
      const float p = __shfl_sync(kWholeWarp, probability, other);
      const auto v = reinterpret_cast<const float*>(__shfl_sync(kWholeWarp, values, other));
#pragma unroll
      for (int i = 0; i < kFloatColumns; ++i) {
        if (v && lane + i * kWarpSize < a.head_size) output[i] += p * v[lane + i * kWarpSize];
      }
    }
  }
  if (row >= head.rows) return;
  const RowResult<float> result(a, head, row, place.split);
  const float factor = sum > 0 ? 1 / sum : 0;
#pragma unroll
  for (int i = 0; i < kFloatColumns; ++i) {
    if (lane + i * kWarpSize < a.head_size) result.store(lane + i * kWarpSize, output[i] * factor);
  }
  if (lane == 0) *result.lse = natural_log_sum(largest, sum);
}

// Adds up the splits of a row, one warp a row: output = Σ output_i · exp(lse_i − lse), lse = log Σ exp(lse_i).
constexpr int kCombineWarps = 4;

template <class T>
__global__ void __launch_bounds__(kCombineWarps* kWarpSize) combine_kernel(ThoughtAttention a) {
  const std::int64_t rows = a.batch * a.query_heads * a.anchors_per_batch * a.steps;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kCombineWarps + warp_number();
  if (row >= rows) return;
  float largest = kLowest;
  for (std::int64_t split = 0; split < a.splits; ++split) largest = larger(a.split_lse[split * rows + row], largest);
  float total = 0;
  for (std::int64_t split = 0; split < a.splits; ++split) {
    total += exp2_approximate((a.split_lse[split * rows + row] - largest) * kLog2E);
  }
  const float factor = total > 0 ? 1 / total : 0;
  for (std::int64_t column = lane_number(); column < a.head_size; column += kWarpSize) {
    float output = 0;
#pragma unroll 4
    for (std::int64_t split = 0; split < a.splits; ++split) {
      const float share = exp2_approximate((a.split_lse[split * rows + row] - largest) * kLog2E);
      output += share * a.split_output[(split * rows + row) * a.head_size + column];
    }
    static_cast<T*>(a.output)[row * a.head_size + column] = rounded<T>(output * factor);
  }
  if (lane_number() == 0) a.lse[row] = total > 0 ? largest + logf(total) : -kInfinity;
}

}  // namespace quietstar::cuda
