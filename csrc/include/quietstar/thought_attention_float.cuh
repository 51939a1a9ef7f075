// Attention of thoughts in float32, and the sum over splits for all dtypes; thought_attention.cuh describes the layout.
#pragma once

#include "quietstar/thought_tiles.cuh"

namespace quietstar::cuda {

// There are no tensor cores for full float32: a warp takes one row at a time; each lane takes a key of a tile, then a
// column of the values. Keys are read directly, those that rows share mostly from the L1 cache.
constexpr int kFloatWarps = 4, kFloatColumns = static_cast<int>(kLargestHead) / kWarpSize;

__global__ void __launch_bounds__(kFloatWarps* kWarpSize, 4) float_attention_kernel(ThoughtAttention a) {
  const BlockPlace place(a, kFloatWarps);
  const AttentionHead& head = place.head;
  const TileList list = tile_list(a, place, kFloatWarps);

  struct Shared {
    float query[kFloatWarps][kLargestHead];
  };
  const int lane = lane_number();
  float* const query = static_shared<Shared>().query[warp_number()];
  const int row = place.first_row + warp_number();
  const RowSight sight = static_shared<BlockSights>().row[warp_number()];
  const bool is_capped = a.mask.softcap != 0;
  const float query_factor = is_capped ? 1 : a.mask.scale * kLog2E;
  for (std::int64_t column = lane; column < a.head_size; column += kWarpSize) {
    query[column] = row < head.rows ? head.query<float>(a, row)[column] * query_factor : 0;
  }
  __syncwarp();

  const int value_size = static_cast<int>(a.value_size);
  float output[kFloatColumns] = {}, largest = kLowest, sum = 0;
  for (int part = list.begin * 2; part < list.end * 2; ++part) {
    const TileList::Key key = list.key(part >> 1, (part & 1) * kWarpSize + lane);
    const bool sees = key.base ? sight.base.has(key.number) : sight.own.has(key.number);
    if (!__any_sync(kWholeWarp, sees)) continue;
    const TileList::Place of_key = list.place(a, key);
    const auto at = [&](const Steps& of_base, const Steps& of_thought) {
      return head.key<float>(key.base ? of_base : of_thought, of_key.position_or_anchor, of_key.step);
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
      if (is_capped) score = capped(score, a.mask) * kLog2E;
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
        if (v && lane + i * kWarpSize < value_size) output[i] += p * v[lane + i * kWarpSize];
      }
    }
  }
  if (row >= head.rows) return;
  const RowResult<float> result(a, head, row, place.split);
  const float factor = sum != 0 ? 1 / sum : 0;
#pragma unroll
  for (int i = 0; i < kFloatColumns; ++i) {
    if (lane + i * kWarpSize < value_size) result.store(lane + i * kWarpSize, output[i] * factor);
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
  const float factor = total != 0 ? 1 / total : 0;
  for (std::int64_t column = lane_number(); column < a.value_size; column += kWarpSize) {
    float output = 0;
#pragma unroll 4
    for (std::int64_t split = 0; split < a.splits; ++split) {
      const float share = exp2_approximate((a.split_lse[split * rows + row] - largest) * kLog2E);
      output += share * a.split_output[(split * rows + row) * a.value_size + column];
    }
    static_cast<T*>(a.output)[row * a.value_size + column] = rounded<T>(output * factor);
  }
  if (lane_number() == 0) a.lse[row] = total != 0 ? largest + logf(total) : -kInfinity;
}

}  // namespace quietstar::cuda
