// mix_logits and mixed_cross_entropy: each pass reads every logit once, and the mix is written only if it is the
// result.
//
// Bytes per logit, where e is its size: mix 3e, its backward 5e (3e without the weight's gradient), cross-entropy 2e,
// its backward 4e. At about ten instructions per logit, all are bound by memory. A row has one block. Every thread
// keeps kInFlight accesses of 16 bytes to each tensor in flight, 16 to 32 KiB per block.
//
// With V = 32002, rows of half precision begin anywhere modulo 16 bytes, though the same in all tensors. Then the first
// few logits, up to a multiple of 16 bytes, and the last few are read one by one.
#pragma once

#include "quietstar/cuda_kernels.h"
#include "quietstar/elements.cuh"
#include "quietstar/reduce.cuh"

namespace quietstar::cuda {

constexpr int kMixThreads = 256, kMixBlocksAProcessor = 4;

template <class T>
__device__ __forceinline__ const T* row_of(const MatrixIn& matrix, std::int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.stride;
}

template <class T>
__device__ __forceinline__ T* row_of(void* contiguous, std::int64_t row, std::int64_t size) {
  return contiguous ? static_cast<T*>(contiguous) + row * size : nullptr;
}

// A row of `kInputs` tensors, cut into vectors, each of which one thread processes.
template <class T, int kInputs>
struct RowReader {
  static constexpr int kInFlight = 6 / kInputs;

  const T* input[kInputs];
  std::int64_t size;

  // Calls use(column, vectors) for all columns, where vectors[i] holds adjacent elements of input i from that column
  // on. Outputs that begin like the inputs modulo 16 bytes can be written with such vectors too. If one does not, or
  // the inputs differ, all vectors have length 1.
  template <class Use>
  __device__ __forceinline__ void for_each_vector(bool outputs_alike, Use use) const {
    constexpr int N = kWidest<T>;
    bool alike = outputs_alike;
    for (int i = 1; i < kInputs; ++i) alike = alike && misalignment(input[i]) == misalignment(input[0]);
    if (!alike) return pieces<1>(0, size, use);
    const std::int64_t head = min(size, static_cast<std::int64_t>((16 - misalignment(input[0])) % 16 / sizeof(T)));
    const std::int64_t tail = head + (size - head) / N * N;
    pieces<N>(head, tail, use);
    // At most N − 1 of either.
    const std::int64_t column = threadIdx.x;
    if (column < head) piece(column, use);
    if (tail + column < size) piece(tail + column, use);
  }

 private:
  template <class Use>
  __device__ __forceinline__ void piece(std::int64_t column, Use& use) const {
    Vector<T, 1> vector[kInputs];
    for (int i = 0; i < kInputs; ++i) vector[i] = load<1>(input[i] + column);
    use(column, vector);
  }

  template <int N, class Use>
  __device__ __forceinline__ void pieces(std::int64_t begin, std::int64_t end, Use& use) const {
    const std::int64_t step = static_cast<std::int64_t>(kMixThreads) * N;
    for (std::int64_t first = begin + static_cast<std::int64_t>(threadIdx.x) * N; first < end;
         first += step * kInFlight) {
      Vector<T, N> vector[kInFlight][kInputs];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (first + j * step < end) {
#pragma unroll
          for (int i = 0; i < kInputs; ++i) vector[j][i] = load<N>(input[i] + first + j * step);
        }
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (first + j * step < end) use(first + j * step, vector[j]);
      }
    }
  }
};

template <class T>
__device__ __forceinline__ bool begin_alike(const T* output, const T* input) {
  return output == nullptr || misalignment(output) == misalignment(input);
}

// Writes gradient(i) · factor for the elements of a vector; nowhere if there is no output.
template <class T, int N>
__device__ __forceinline__ void store_scaled(T* output, std::int64_t column, const float (&gradient)[N], float factor) {
  if (output == nullptr) return;
  Vector<T, N> vector;
#pragma unroll
  for (int i = 0; i < N; ++i) vector.element[i] = rounded<T>(gradient[i] * factor);
  store(output + column, vector);
}

// Computes z = (1 − w) b + w t of a row, −∞ if both are −∞, else −∞ of weight exactly 0 adds nothing; and t − b, or 0
// where either is infinite.
struct RowMix {
  float weight;

  __device__ __forceinline__ float difference(float b, float t) const {
    return fabsf(b) == kInfinity || fabsf(t) == kInfinity ? 0 : t - b;
  }

  __device__ __forceinline__ float mixed(float b, float t) const {
    const float of_base = weight == 1 ? 0 : (weight - 1) * kInfinity,
                of_thought = weight == 0 ? 0 : -weight * kInfinity;
    if (b == -kInfinity) return t == -kInfinity ? t : t + of_base;
    if (t == -kInfinity) return b + of_thought;
    return (1 - weight) * b + weight * t;
  }
};

template <class T>
__global__ void __launch_bounds__(kMixThreads, kMixBlocksAProcessor) mix_kernel(MixForward a) {
  const std::int64_t row = blockIdx.x;
  const RowMix mix = {a.mix.weight[row]};
  T* const mixed = row_of<T>(a.mixed, row, a.mix.vocabulary);
  const RowReader<T, 2> reader{{row_of<T>(a.mix.base, row), row_of<T>(a.mix.thought, row)}, a.mix.vocabulary};
  reader.for_each_vector(begin_alike(mixed, reader.input[0]), [&](std::int64_t column, const auto* vector) {
    auto result = vector[0];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof result / sizeof(T)); ++i) {
      result.element[i] = rounded<T>(mix.mixed(to_float(vector[0].element[i]), to_float(vector[1].element[i])));
    }
    store(mixed + column, result);
  });
}

template <class T, bool kWithWeight>
__global__ void __launch_bounds__(kMixThreads, kMixBlocksAProcessor) mix_backward_kernel(MixBackward a) {
  const std::int64_t row = blockIdx.x;
  const RowMix mix = {a.mix.weight[row]};
  T* const d_base = row_of<T>(a.d_base, row, a.mix.vocabulary);
  T* const d_thought = row_of<T>(a.d_thought, row, a.mix.vocabulary);
  constexpr int kInputs = kWithWeight ? 3 : 1;
  RowReader<T, kInputs> reader{{row_of<T>(a.grad, row)}, a.mix.vocabulary};
  if constexpr (kWithWeight) {
    reader.input[1] = row_of<T>(a.mix.base, row);
    reader.input[2] = row_of<T>(a.mix.thought, row);
  }
  Softmax sums;  // only its total is used, for Σ grad · (t − b)
  const bool alike = begin_alike(d_base, reader.input[0]) && begin_alike(d_thought, reader.input[0]);
  reader.for_each_vector(alike, [&](std::int64_t column, const auto* vector) {
    constexpr int N = sizeof *vector / sizeof(T);
    float gradient[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      gradient[i] = to_float(vector[0].element[i]);
      if constexpr (kWithWeight) {
        sums.total += gradient[i] * mix.difference(to_float(vector[1].element[i]), to_float(vector[2].element[i]));
      }
    }
    store_scaled(d_base, column, gradient, 1 - mix.weight);
    store_scaled(d_thought, column, gradient, mix.weight);
  });
  if constexpr (kWithWeight) {
    const float total = merged_over_block(sums).total;
    if (threadIdx.x == 0) a.d_weight[row] = total;
  }
}

template <class T>
__global__ void __launch_bounds__(kMixThreads, kMixBlocksAProcessor) mixed_cross_entropy_kernel(MixedCrossEntropy a) {
  const std::int64_t row = blockIdx.x;
  const RowMix mix = {a.mix.weight[row]};
  const RowReader<T, 2> reader{{row_of<T>(a.mix.base, row), row_of<T>(a.mix.thought, row)}, a.mix.vocabulary};
  Softmax sums;
  reader.for_each_vector(true, [&](std::int64_t, const auto* vector) {
    constexpr int N = sizeof *vector / sizeof(T);
    float z[N], difference[N], highest = sums.peak;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float b = to_float(vector[0].element[i]), t = to_float(vector[1].element[i]);
      difference[i] = mix.difference(b, t);
      z[i] = mix.mixed(b, t);
      highest = larger(highest, z[i]);
    }
    if (highest > sums.peak) sums.raise(highest);  // seldom, after the first few
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float exponential = exp2_approximate((z[i] - sums.peak) * kLog2E);
      sums.total += exponential;
      sums.moment += exponential * difference[i];
    }
  });
  sums = merged_over_block(sums);
  if (threadIdx.x != 0) return;
  const std::int64_t target = a.target[row];
  const float b = to_float(reader.input[0][target]), t = to_float(reader.input[1][target]);
  const float log_total = logf(sums.total);
  a.largest[row] = sums.peak;
  a.log_total[row] = log_total;
  a.nll[row] = log_total - (mix.mixed(b, t) - sums.peak);
  a.slope[row] = sums.moment / sums.total - mix.difference(b, t);
}

template <class T>
__global__ void __launch_bounds__(kMixThreads, kMixBlocksAProcessor)
    mixed_cross_entropy_backward_kernel(MixedCrossEntropyBackward a) {
  const std::int64_t row = blockIdx.x;
  const RowMix mix = {a.mix.weight[row]};
  const float scale = a.scale[row];
  T* const d_base = row_of<T>(a.d_base, row, a.mix.vocabulary);
  T* const d_thought = row_of<T>(a.d_thought, row, a.mix.vocabulary);
  if (scale == 0) {  // the row's logits do not matter and need not be finite
    for (std::int64_t column = threadIdx.x; column < a.mix.vocabulary; column += kMixThreads) {
      if (d_base) d_base[column] = rounded<T>(0);
      if (d_thought) d_thought[column] = rounded<T>(0);
    }
    return;
  }
  const float largest = a.largest[row], log_total = a.log_total[row];
  const std::int64_t target = a.target[row];
  const RowReader<T, 2> reader{{row_of<T>(a.mix.base, row), row_of<T>(a.mix.thought, row)}, a.mix.vocabulary};
  const bool alike = begin_alike(d_base, reader.input[0]) && begin_alike(d_thought, reader.input[0]);
  reader.for_each_vector(alike, [&](std::int64_t column, const auto* vector) {
    constexpr int N = sizeof *vector / sizeof(T);
    float gradient[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float z = mix.mixed(to_float(vector[0].element[i]), to_float(vector[1].element[i]));
      const float probability = exp2_approximate((z - largest - log_total) * kLog2E);
      gradient[i] = scale * (column + i == target ? probability - 1 : probability);
    }
    store_scaled(d_base, column, gradient, 1 - mix.weight);
    store_scaled(d_thought, column, gradient, mix.weight);
  });
}

}  // namespace quietstar::cuda
