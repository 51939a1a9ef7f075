// The row kernel of sampling: one token for every row of a chunk of logits, with the noise of linear_sample/noise.py.
//
// The noise of all tokens would cost 25 times what reading their logits does, so groups of tokens that cannot win are
// not drawn. A group of 64 can score no more than its largest logit against its first arrival; the groups are drawn in
// the order of these bounds until no bound reaches the best score. From memory a row is read once.

#include <initializer_list>

#include "kernel_table.h"
#include "parallel.h"

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

constexpr int kGroup = 64;
constexpr int kCalls = kGroup / 4;            // of Philox for the tokens of a group
constexpr uint32_t kTokens = 0, kGroups = 1;  // the last word of the counter

// Added to bounds: logarithms are exact to far less than this, but not monotonic to the last bit.
constexpr float kSlack = 1e-5f;

// 64-bit products of the even-numbered words of a and b, with zeros or anything in the odd-numbered ones.
WideVec products(WordVec a, WordVec b) {
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

  // −log1p(−u) of the u that a word stands for. With y = 1 − u rounded, log(y) u / (1 − y) has the error of y neither
  // in small u, where log(y) alone would have lost all digits, nor in large ones.
  static Vec exponential(WordVec word) {
    const Vec largest = splat(1 - 0x1p-24f), drawn = (__builtin_convertvector(word, Vec) + 0.5f) * 0x1p-32f;
    const Vec u = drawn < largest ? drawn : largest, y = 1.0f - u;
    return y == 1.0f ? u : -log(y) * u / (1.0f - y);
  }

  // First arrivals in all groups, an even number of them.
  void first_arrivals(float* first, int64_t groups) const {
    for (int64_t group = 0; group < groups; group += 2 * kLanes) {
      const Words words = philox((uint32_t)(group / 2), kGroups);
      const Vec even = exponential(words.word[0]) * (1.0f / kGroup), odd = exponential(words.word[2]) * (1.0f / kGroup);
      for (int lane = 0; lane < kLanes && group + 2 * lane < groups; ++lane) {
        first[group + 2 * lane] = even[lane];
        first[group + 2 * lane + 1] = odd[lane];
      }
    }
  }

  // Arrival times of the tokens of one group, of which the first arrives at `first`.
  void arrivals(int64_t group, float first, float* times) const {
    for (int call = 0; call < kCalls; call += kLanes) {
      const Words words = philox((uint32_t)(group * kCalls + call), kTokens);
      for (int i = 0; i < 4; ++i) {
        const Vec later = exponential(words.word[i]);
        for (int lane = 0; lane < kLanes; ++lane) times[4 * (call + lane) + i] = first + later[lane];
      }
    }
    const Words words = philox((uint32_t)(group / 2), kGroups);
    times[words.word[group % 2 ? 3 : 1][0] >> 26] = first;
  }
};

// Float32 as an integer of the same order, the two zeros alike.
uint32_t key(float x) {
  x += 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

// The largest key such that all logits with at least this key together weigh `limit` or more (one each, without
// weights); the smallest key there is if all together weigh less. Digit by digit, from the histogram of each.
uint32_t cut(const float* logits, const float* weights, int64_t size, double limit) {
  uint32_t prefix = 0;
  int shift = 32;
  double above = 0;  // weight of the keys with larger prefixes
  for (int bits : {11, 11, 10}) {
    double histogram[1 << 11] = {};
    shift -= bits;
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t digits = key(logits[i]) >> shift;
      if ((uint64_t)digits >> bits == prefix) histogram[digits & ((1u << bits) - 1)] += weights ? weights[i] : 1.0;
    }
    uint32_t chosen = 0;
    for (int digit = (1 << bits) - 1; digit >= 0; --digit) {
      if (histogram[digit] == 0) continue;
      chosen = (uint32_t)digit;
      if (above + histogram[digit] >= limit) break;
      above += histogram[digit];
    }
    prefix = prefix << bits | chosen;
  }
  return prefix;
}

// Sets all logits to −∞ but the most likely: see keep_most_likely in linear_sample/reference.py.
void keep_most_likely(const SampleRows& a, float* logits, float* weights) {
  const int64_t size = a.groups * kGroup;
  const auto keep = [&](uint32_t smallest) {
    for (int64_t i = 0; i < size; ++i) logits[i] = key(logits[i]) >= smallest ? logits[i] : -kInfinity;
  };
  if (a.top_k) keep(cut(logits, nullptr, size, (double)a.top_k));
  if (a.top_p == 1) return;
  Vec highest = splat(kLowest);
  for (int64_t i = 0; i < size; i += kLanes) highest = larger(load(logits + i, Whole{}), highest);
  const float top = largest_of(highest);
  double total = 0;
  for (int64_t i = 0; i < size; i += kGroup) {
    Vec sum{};
    for (int64_t j = i; j < i + kGroup; j += kLanes) {
      const Vec weight = exp((load(logits + j, Whole{}) - top) / a.temperature);
      store(weights + j, weight, Whole{});
      sum += weight;
    }
    total += sum_of(sum);
  }
  keep(cut(logits, weights, size, a.top_p * total));
}

// The largest of `size` numbers and where it is first found.
struct Largest {
  float value;
  int64_t place;
};

Largest find_largest(const float* numbers, int64_t size) {
  Vec highest = splat(-kInfinity);
  for_vectors(0, size, [&](int64_t i, auto extent) {
    highest = larger(inside_or(load(numbers + i, extent), -kInfinity, extent), highest);
  });
  const float value = largest_of(highest);
  int64_t place = 0;
  while (place < size - 1 && numbers[place] != value) ++place;
  return {value, place};
}

}  // namespace

void sample_rows(const SampleRows& a) {
  const int64_t size = a.groups * kGroup, pairs = a.groups + a.groups % 2;
  const bool filtered = a.top_k || a.top_p < 1;
  const Scratch scratch(2 * pairs + (filtered ? size : 0), a.threads);
  for_rows(a.rows, useful_threads(a.rows, 2 * size, a.threads), [&](int64_t row, int thread) {
    float *first = scratch.of_thread(thread), *bounds = first + pairs, *logits = a.logits + row * size;
    const Noise noise{(uint64_t)a.seed, (uint64_t)(a.first_row + row)};
    for (int64_t i = 0; i < a.suppressed_count; ++i) logits[a.suppressed[i]] = -kInfinity;
    if (filtered) keep_most_likely(a, logits, bounds + pairs);

    noise.first_arrivals(first, pairs);
    for (int64_t group = 0; group < a.groups; ++group) {
      Vec highest = load(logits + group * kGroup, Whole{});
      for (int i = kLanes; i < kGroup; i += kLanes) {
        highest = larger(load(logits + group * kGroup + i, Whole{}), highest);
      }
      bounds[group] = largest_of(highest);
    }
    for_vectors(0, a.groups, [&](int64_t group, auto extent) {
      const Vec earliest = inside_or(load(first + group, extent), 1, extent);
      store(bounds + group, load(bounds + group, extent) / a.temperature - log(earliest) + kSlack, extent);
    });

    float best = -kInfinity;
    int64_t winner = 0;
    for (int64_t drawn = 0; drawn < a.groups; ++drawn) {
      const Largest next = find_largest(bounds, a.groups);
      if (!(next.value >= best) || next.value == -kInfinity) break;
      bounds[next.place] = -kInfinity;
      float scores[kGroup];
      noise.arrivals(next.place, first[next.place], scores);
      for (int i = 0; i < kGroup; i += kLanes) {
        const Vec z = load(logits + next.place * kGroup + i, Whole{});
        store(scores + i, z / a.temperature - log(load(scores + i, Whole{})), Whole{});
      }
      const Largest score = find_largest(scores, kGroup);
      if (score.value > best) best = score.value, winner = next.place * kGroup + score.place;
    }
    a.tokens[row] = winner;
  });
}

}  // namespace quietstar::cpu::QUIETSTAR_ISA
