// The noise of sampling: the same bits as quietstar/ops/linear_sample/noise.py, which says what they mean.
#pragma once

#include "quietstar/device.cuh"

namespace quietstar::cuda {

constexpr int kGroup = 64;                 // tokens
constexpr int kCallsOfGroup = kGroup / 4;  // of Philox, for its tokens

struct Words {
  std::uint32_t word[4];
};

struct Noise {
  std::uint64_t seed, row;

  // Philox4x32-10 (Salmon et al., SC 2011).
  __device__ __forceinline__ Words philox(std::uint32_t counter, std::uint32_t stream) const {
    std::uint32_t c0 = counter, c1 = static_cast<std::uint32_t>(row), c2 = static_cast<std::uint32_t>(row >> 32);
    std::uint32_t c3 = stream, k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const std::uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
      const std::uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
  }

  static __device__ __forceinline__ float exponential(std::uint32_t word) {
    const float u = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
    return -log1pf(-(u < 1 - 0x1p-24f ? u : 1 - 0x1p-24f));
  }

  // The words of tokens 4 · call ... 4 · call + 3.
  __device__ __forceinline__ Words of_tokens(std::uint32_t call) const { return philox(call, 0); }

  // Of two groups: when the first arrives in each, and at which place in it. Groups 2 · pair and 2 · pair + 1.
  struct First {
    float time[2];
    int place[2];
  };
  __device__ __forceinline__ First of_groups(std::uint32_t pair) const {
    const Words words = philox(pair, 1);
    return {{exponential(words.word[0]) * (1.0f / kGroup), exponential(words.word[2]) * (1.0f / kGroup)},
            {static_cast<int>(words.word[1] >> 26), static_cast<int>(words.word[3] >> 26)}};
  }
};

}  // namespace quietstar::cuda
