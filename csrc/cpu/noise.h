// The noise of linear_sample/noise.py: arrival times of the tokens in groups of 64, from Philox.
#pragma once

#include "vector.h"

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

constexpr int kGroup = 64;
constexpr int kCalls = kGroup / 4;            // of Philox for the tokens of a group
constexpr uint32_t kTokens = 0, kGroups = 1;  // the last word of the counter

// 64-bit products of the even-numbered words of a and b, with zeros or anything in the odd-numbered ones.
inline WideVec products(WordVec a, WordVec b) {
#if defined(__AVX512F__)
  return (WideVec)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (WideVec)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (WideVec)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return ((WideVec)a & 0xFFFFFFFF) * ((WideVec)b & 0xFFFFFFFF);
#endif
}

struct Words {
  WordVec word[4];
};

struct Noise {
  uint64_t seed, row;

  // Philox4x32-10 (Salmon et al., SC 2011) with consecutive counters in the lanes.
  Words philox(uint32_t first_counter, uint32_t stream) const {
    const WordVec zeros{};
    WordVec c0 = (WordVec)lane_numbers() + first_counter, c1 = zeros + (uint32_t)row;
    WordVec c2 = zeros + (uint32_t)(row >> 32), c3 = zeros + stream;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
      const WordVec m0 = zeros + 0xD2511F53, m1 = zeros + 0xCD9E8D57;
      const WideVec even0 = products(c0, m0), odd0 = products((WordVec)((WideVec)c0 >> 32), m0);
      const WideVec even1 = products(c2, m1), odd1 = products((WordVec)((WideVec)c2 >> 32), m1);
      c0 = high_words(even1, odd1) ^ c1 ^ k0;
      c2 = high_words(even0, odd0) ^ c3 ^ k1;
      c1 = low_words(even1, odd1);
      c3 = low_words(even0, odd0);
    }
    return {{c0, c1, c2, c3}};
  }

  static WordVec high_words(WideVec even, WideVec odd) { return (WordVec)((even >> 32) | (odd & 0xFFFFFFFF00000000)); }
  static WordVec low_words(WideVec even, WideVec odd) { return (WordVec)((even & 0xFFFFFFFF) | (odd << 32)); }

  // −log1p(−u) for the u that a word stands for. With y = 1 − u rounded, log(y) u / (1 − y) is free of the error of y,
  // both for small u, where log(y) alone would have lost all digits, and for large u.
  static Vec exponential(WordVec word) {
    const Vec largest = splat(1 - 0x1p-24f), drawn = (__builtin_convertvector(word, Vec) + 0.5f) * 0x1p-32f;
    const Vec u = drawn < largest ? drawn : largest, y = 1.0f - u;
    return y == 1.0f ? u : -log(y) * u / (1.0f - y);
  }

  // First arrivals in the groups from `begin` on, and the tokens' places in their groups. Both numbers are even.
  void first_arrivals(int64_t begin, int64_t groups, float* first, int32_t* places) const {
    for (int64_t group = 0; group < groups; group += 2 * kLanes) {
      const Words words = philox((uint32_t)((begin + group) / 2), kGroups);
      const Vec even = exponential(words.word[0]) * (1.0f / kGroup), odd = exponential(words.word[2]) * (1.0f / kGroup);
      for (int lane = 0; lane < kLanes && group + 2 * lane < groups; ++lane) {
        first[group + 2 * lane] = even[lane];
        first[group + 2 * lane + 1] = odd[lane];
        places[group + 2 * lane] = (int32_t)(words.word[1][lane] >> 26);
        places[group + 2 * lane + 1] = (int32_t)(words.word[3][lane] >> 26);
      }
    }
  }

  // Arrival times of the tokens of one group, of which the one at `place` is the first and arrives at `first`.
  void arrivals(int64_t group, float first, int32_t place, float* times) const {
    for (int call = 0; call < kCalls; call += kLanes) {
      const Words words = philox((uint32_t)(group * kCalls + call), kTokens);
      for (int i = 0; i < 4; ++i) {
        const Vec later = exponential(words.word[i]);
        for (int lane = 0; lane < kLanes; ++lane) times[4 * (call + lane) + i] = first + later[lane];
      }
    }
    times[place] = first;
  }
};

}  // namespace
}  // namespace quietstar::cpu::QUIETSTAR_ISA
