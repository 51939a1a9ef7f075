// The row kernel of the linear cross-entropies: a chunk of logits becomes nll, entropy and gradient.
//
// Bytes per logit: 4 read, and 2 of gradient written in half precision (4 in float32) into the same memory. A row has
// one block, which holds up to 32,768 logits in registers, 32 per thread in eight loads of 16 bytes, all in flight at
// once. Longer rows are read twice, the second time mostly from the L2 cache.
//
// A gradient of half the width overwrites, in the first half of its row, logits that other threads read. So none is
// written before all logits that it overwrites have been read.
//
// kMore: with a cap, an entropy or its gradient; registers then hold half as many logits.
#pragma once

#include "quietstar/cuda_kernels.h"
#include "quietstar/elements.cuh"
#include "quietstar/reduce.cuh"

namespace quietstar::cuda {

// Logits of a thread. With kMore, the gradient needs both logits and exponentials, and registers hold half as many
// logits.
template <bool kMore>
constexpr int kRowVectors = kMore ? 4 : 8;
constexpr int kRowWidth = kWidest<float>;
constexpr int kRowMostThreads = 1024;

using RowVector = Vector<float, kRowWidth>;

// Four logits from `column` on, −∞ from the end of the row on.
template <bool kAligned>
__device__ __forceinline__ RowVector load_logits(const float* row, std::int64_t column, std::int64_t size) {
  if (kAligned && column + kRowWidth <= size) return load<kRowWidth>(row + column);
  RowVector vector;
#pragma unroll
  for (int i = 0; i < kRowWidth; ++i) vector.element[i] = column + i < size ? row[column + i] : -kInfinity;
  return vector;
}

// Lower limit on differences of logits that are multiplied by their exponentials; −∞ times 0 would be NaN.
constexpr float kFarBelow = -1e4f;

// Largest logit, Σ e^z and Σ z e^z over the differences z = (logit − largest) / temperature.
template <bool kMore>
struct RowSum {
  float largest = kLowest, total = 0, moment = 0;

  __device__ __forceinline__ void raise(float to, float inverse_temperature) {
    const float down = (largest - to) * inverse_temperature, shrink = exp2_approximate(down * kLog2E);
    if constexpr (kMore) moment = shrink * (moment + larger(down, kFarBelow) * total);
    total *= shrink;
    largest = to;
  }

  __device__ __forceinline__ void add(float logit, float inverse_temperature) {
    const float z = (logit - largest) * inverse_temperature, exponential = exp2_approximate(z * kLog2E);
    if constexpr (kMore) moment += larger(z, kFarBelow) * exponential;
    total += exponential;
  }

  __device__ __forceinline__ RowSum over_lanes(float inverse_temperature) const {
    RowSum sum = *this;
    sum.raise(largest_of_lanes(largest), inverse_temperature);
    sum.total = sum_of_lanes(sum.total);
    if constexpr (kMore) sum.moment = sum_of_lanes(sum.moment);
    return sum;
  }
};

// Combines the threads' results to that of the block.
template <bool kMore>
__device__ __forceinline__ RowSum<kMore> row_sum(RowSum<kMore> sum, float inverse_temperature) {
  struct Shared {
    RowSum<kMore> of_warp[kMostWarps];
  };
  Shared& shared = static_shared<Shared>();
  const int warps = static_cast<int>(blockDim.x) / kWarpSize, lane = lane_number();
  sum = sum.over_lanes(inverse_temperature);
  if (lane == 0) shared.of_warp[warp_number()] = sum;
  __syncthreads();
  sum = lane < warps ? shared.of_warp[lane] : RowSum<kMore>{};
  return sum.over_lanes(inverse_temperature);
}

// Numbers that turn logits into probabilities and gradients.
template <bool kMore>
struct RowGradient {
  float largest, inverse_temperature, inverse_total, factor;
  std::int64_t target;
  float entropy_factor, mean, inverse_softcap;  // mean: of (logit − largest) / temperature

  __device__ __forceinline__ float of(float logit, bool is_target) const {
    const float z = (logit - largest) * inverse_temperature;
    const float probability = exp2_approximate(z * kLog2E) * inverse_total;
    const float gradient = factor * (is_target ? probability - 1 : probability);
    if constexpr (!kMore) return gradient;
    if (probability == 0 && !is_target) return 0;  // the logit may be −∞
    const float part = logit * inverse_softcap;
    return (gradient + entropy_factor * probability * (larger(z, kFarBelow) - mean)) * (1 - part * part);
  }

  template <class G, bool kAligned>
  __device__ __forceinline__ void store(G* row, std::int64_t column, std::int64_t size, const RowVector& logits) const {
    Vector<G, kRowWidth> vector;
#pragma unroll
    for (int i = 0; i < kRowWidth; ++i) vector.element[i] = rounded<G>(of(logits.element[i], column + i == target));
    if (kAligned && column + kRowWidth <= size) return cuda::store(row + column, vector);
#pragma unroll
    for (int i = 0; i < kRowWidth; ++i) {
      if (column + i < size) row[column + i] = vector.element[i];
    }
  }
};

template <class G, bool kAligned, bool kMore>
__global__ void __launch_bounds__(kRowMostThreads) cross_entropy_row_kernel(CrossEntropyRows a) {
  const std::int64_t row = blockIdx.x;
  float* const logits = a.logits + row * a.stride;
  const std::int64_t step = static_cast<std::int64_t>(blockDim.x) * kRowWidth;
  const std::int64_t first = static_cast<std::int64_t>(threadIdx.x) * kRowWidth;
  const bool resident = a.vocabulary <= step * kRowVectors<kMore>;
  const std::int64_t target = a.target[row];
  const auto load_capped = [&](std::int64_t column) {
    RowVector vector = load_logits<kAligned>(logits, column, a.vocabulary);
    if (kMore && a.softcap != 0) {
#pragma unroll
      for (float& element : vector.element) element = capped(element, a.softcap);
    }
    return vector;
  };
  const float at_target = kMore && a.softcap != 0 ? capped(logits[target], a.softcap) : logits[target];

  constexpr int kVectors = kRowVectors<kMore>;
  RowVector vector[kVectors];
  RowSum<kMore> of_thread;
  for (std::int64_t begin = first; begin - first < a.vocabulary; begin += step * kVectors) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) vector[j] = load_capped(begin + j * step);
    float highest = of_thread.largest;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int i = 0; i < kRowWidth; ++i) highest = larger(highest, vector[j].element[i]);
    }
    of_thread.raise(highest, a.inverse_temperature);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int i = 0; i < kRowWidth; ++i) of_thread.add(vector[j].element[i], a.inverse_temperature);
    }
  }
  const auto sum = row_sum(of_thread, a.inverse_temperature);  // after its barrier, all threads have read the row
  const float mean = sum.moment / sum.total;
  if (threadIdx.x == 0) {
    a.nll[row] = logf(sum.total) - (at_target - sum.largest) * a.inverse_temperature;
    if (kMore && a.entropy) a.entropy[row] = logf(sum.total) - mean;
  }
  if (a.scale == nullptr) return;

  const RowGradient<kMore> gradient = {
      sum.largest,   a.inverse_temperature,
      1 / sum.total, a.scale[row] * a.inverse_temperature,
      target,        kMore && a.entropy_scale ? a.entropy_scale[row] * a.inverse_temperature : 0,
      mean,          kMore && a.softcap != 0 ? 1 / a.softcap : 0};
  G* const output = reinterpret_cast<G*>(logits);
  if (resident) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const std::int64_t column = first + j * step;
      if (column < a.vocabulary) gradient.template store<G, kAligned>(output, column, a.vocabulary, vector[j]);
    }
    return;
  }
  for (std::int64_t begin = 0; begin < a.vocabulary; begin += step) {
    const RowVector again = load_capped(begin + first);
    __syncthreads();  // writes from here on overwrite only logits of this step and earlier ones
    gradient.template store<G, kAligned>(output, begin + first, a.vocabulary, again);
  }
}

}  // namespace quietstar::cuda
