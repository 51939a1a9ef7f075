// Sums and the like over a warp or a block, always in the same order.
#pragma once

#include "quietstar/device.cuh"

namespace quietstar::cuda {

constexpr int kWarpSize = 32;
constexpr int kMostWarps = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// The maximum of an empty set of numbers. −∞ is not used in arithmetic here, since −∞ − (−∞) would be NaN.
constexpr float kLowest = -3.4e38f;
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ int lane_number() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_number() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// Combines the values of `lanes` neighbouring lanes, a power of two; all of them get the result.
template <class Combine>
__device__ __forceinline__ float reduce_lanes(float value, Combine combine, int lanes = kWarpSize) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kWholeWarp, value, distance));
  }
  return value;
}

__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }

// Computes cap · tanh(logit / cap), but keeps infinities, so that a token of probability 0 stays impossible.
__device__ __forceinline__ float capped(float logit, float cap) {
  return logit == kInfinity || logit == -kInfinity ? logit : cap * tanhf(logit / cap);
}

__device__ __forceinline__ float largest_of_lanes(float value, int lanes = kWarpSize) {
  return reduce_lanes(value, [](float a, float b) { return larger(a, b); }, lanes);
}

__device__ __forceinline__ float sum_of_lanes(float value, int lanes = kWarpSize) {
  return reduce_lanes(value, [](float a, float b) { return a + b; }, lanes);
}

// Σ exp(z − peak) and Σ exp(z − peak) · d over some logits z, with their largest.
struct Softmax {
  float peak = kLowest, total = 0, moment = 0;

  // Both sums on the scale of whichever peak is larger.
  __device__ __forceinline__ void raise(float to) {
    const float shrink = exp2_approximate((peak - to) * kLog2E);
    total *= shrink;
    moment *= shrink;
    peak = to;
  }

  __device__ __forceinline__ void merge(Softmax other) {
    const float highest = larger(peak, other.peak);
    raise(highest);
    other.raise(highest);
    total += other.total;
    moment += other.moment;
  }
};

__device__ __forceinline__ Softmax merged_over_lanes(Softmax value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value.merge({__shfl_xor_sync(kWholeWarp, value.peak, distance), __shfl_xor_sync(kWholeWarp, value.total, distance),
                 __shfl_xor_sync(kWholeWarp, value.moment, distance)});
  }
  return value;
}

// Reduces over the block; all threads get the result. Call it once in a kernel, or between barriers.
__device__ __forceinline__ Softmax merged_over_block(Softmax value) {
  struct Shared {
    float peak[kMostWarps], total[kMostWarps], moment[kMostWarps];
  };
  Shared& shared = static_shared<Shared>();
  value = merged_over_lanes(value);
  if (lane_number() == 0) {
    shared.peak[warp_number()] = value.peak;
    shared.total[warp_number()] = value.total;
    shared.moment[warp_number()] = value.moment;
  }
  __syncthreads();
  const int lane = lane_number();
  if (lane < static_cast<int>(blockDim.x) / kWarpSize) {
    value = {shared.peak[lane], shared.total[lane], shared.moment[lane]};
  } else {
    value = {};
  }
  return merged_over_lanes(value);
}

}  // namespace quietstar::cuda
