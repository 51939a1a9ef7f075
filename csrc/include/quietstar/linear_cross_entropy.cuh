// The row kernel of the linear cross-entropies: a chunk of logits becomes nll and gradient.
//
// Bytes per logit: 4 read, and 2 of gradient written in half precision (4 in float32) into the same memory. A row has
// one block, which holds up to 32,768 logits in registers, 32 a thread in eight loads of 16 bytes, all of them under
// way at once. Longer rows are read twice, the second time mostly from the L2 cache.
//
// A gradient of half the width covers, in the first half of its row, logits that other threads read: none is written
// before all that it covers are read.
#pragma once

#include "quietstar/cuda_kernels.h"
#include "quietstar/elements.cuh"
#include "quietstar/reduce.cuh"

namespace quietstar::cuda {

constexpr int kRowVectors = 8;  // of a thread
constexpr int kRowWidth = kWidest<float>;
constexpr int kRowMostThreads = 1024;
constexpr std::int64_t kRowMostLogits = kRowMostThreads * kRowVectors * kRowWidth;

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

// What turns logits into probabilities and gradients.
struct RowGradient {
  float largest, inverse_temperature, inverse_total, factor;
  std::int64_t target;

  template <class G, bool kAligned>
  __device__ __forceinline__ void store(G* row, std::int64_t column, std::int64_t size, const RowVector& logits) const {
    Vector<G, kRowWidth> vector;
#pragma unroll
    for (int i = 0; i < kRowWidth; ++i) {
      const float probability =
          exp2_approximate((logits.element[i] - largest) * inverse_temperature * kLog2E) * inverse_total;
      vector.element[i] = rounded<G>(factor * (column + i == target ? probability - 1 : probability));
    }
    if (kAligned && column + kRowWidth <= size) return cuda::store(row + column, vector);
#pragma unroll
    for (int i = 0; i < kRowWidth; ++i) {
      if (column + i < size) row[column + i] = vector.element[i];
    }
  }
};

struct RowSum {
  float largest, total;
};

// Largest logit and Σ exp((z − largest) / temperature) of the block, from those of its threads.
__device__ __forceinline__ RowSum row_sum(float largest, float total, float inverse_temperature) {
  struct Shared {
    float largest[kMostWarps], total[kMostWarps];
  };
  Shared& shared = static_shared<Shared>();
  const int warps = static_cast<int>(blockDim.x) / kWarpSize, lane = lane_number();
  const float highest_of_warp = largest_of_lanes(largest);
  total *= exp2_approximate((largest - highest_of_warp) * inverse_temperature * kLog2E);
  total = sum_of_lanes(total);
  if (lane == 0) {
    shared.largest[warp_number()] = highest_of_warp;
    shared.total[warp_number()] = total;
  }
  __syncthreads();
  largest = lane < warps ? shared.largest[lane] : kLowest;
  total = lane < warps ? shared.total[lane] : 0;
  const float highest = largest_of_lanes(largest);
  return {highest, sum_of_lanes(total * exp2_approximate((largest - highest) * inverse_temperature * kLog2E))};
}

template <class G, bool kAligned>
__global__ void __launch_bounds__(kRowMostThreads) cross_entropy_row_kernel(CrossEntropyRows a) {
  const std::int64_t row = blockIdx.x;
  float* const logits = a.logits + row * a.stride;
  const std::int64_t step = static_cast<std::int64_t>(blockDim.x) * kRowWidth;
  const std::int64_t first = static_cast<std::int64_t>(threadIdx.x) * kRowWidth;
  const bool resident = a.vocabulary <= step * kRowVectors;
  const std::int64_t target = a.target[row];
  const float at_target = logits[target];

  RowVector vector[kRowVectors];
  float largest = kLowest, total = 0;
  for (std::int64_t begin = first; begin - first < a.vocabulary; begin += step * kRowVectors) {
#pragma unroll
    for (int j = 0; j < kRowVectors; ++j) {
      vector[j] = load_logits<kAligned>(logits, begin + j * step, a.vocabulary);
    }
    float highest = largest;
#pragma unroll
    for (int j = 0; j < kRowVectors; ++j) {
#pragma unroll
      for (int i = 0; i < kRowWidth; ++i) highest = larger(highest, vector[j].element[i]);
    }
    total *= exp2_approximate((largest - highest) * a.inverse_temperature * kLog2E);
    largest = highest;
#pragma unroll
    for (int j = 0; j < kRowVectors; ++j) {
#pragma unroll
      for (int i = 0; i < kRowWidth; ++i) {
        total += exp2_approximate((vector[j].element[i] - largest) * a.inverse_temperature * kLog2E);
      }
    }
  }
  const RowSum sum = row_sum(largest, total, a.inverse_temperature);  // behind its barrier, all have read the row
  if (threadIdx.x == 0) a.nll[row] = logf(sum.total) - (at_target - sum.largest) * a.inverse_temperature;
  if (a.scale == nullptr) return;

  const RowGradient gradient = {sum.largest, a.inverse_temperature, 1 / sum.total, a.scale[row] * a.inverse_temperature,
                                target};
  G* const output = reinterpret_cast<G*>(logits);
  if (resident) {
#pragma unroll
    for (int j = 0; j < kRowVectors; ++j) {
      const std::int64_t column = first + j * step;
      if (column < a.vocabulary) gradient.store<G, kAligned>(output, column, a.vocabulary, vector[j]);
    }
    return;
  }
  for (std::int64_t begin = 0; begin < a.vocabulary; begin += step) {
    const RowVector again = load_logits<kAligned>(logits, begin + first, a.vocabulary);
    __syncthreads();  // what is written now covers logits of this step and earlier ones only
    gradient.store<G, kAligned>(output, begin + first, a.vocabulary, again);
  }
}

}  // namespace quietstar::cuda
