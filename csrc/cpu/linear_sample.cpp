// Sampling: one token for every row, from its logits or from the hidden states and the weight they are the product of.
//
// The noise of all tokens would cost 25 times what reading their logits does, so groups of tokens that cannot win are
// not drawn. A group of 64 can score no more than its largest logit against its first arrival; the groups are drawn in
// the order of these bounds until no bound reaches the best score. Nor can a group win whose bound does not reach the
// score of some token that arrives first in its group, which needs no more noise: the logits of such groups, all but
// a few, are never written by the kernel that makes them.

#include <initializer_list>

#include "kernel_table.h"
#include "matmul.h"
#include "noise.h"

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

// In place of a token where none can be drawn: see linear_sample/inputs.py.
constexpr int64_t kNoToken = -1;

// Added to bounds: logarithms are exact to far less than this, but not monotonic to the last bit.
constexpr float kSlack = 1e-5f;

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

// What is known of the groups of a row before their tokens are drawn.
struct Groups {
  float *first, *bounds;  // first arrival; what no score of the group exceeds, −∞ if it is out
  int32_t* places;        // whose arrival the first is
};

// +∞ also if one is NaN.
float largest_in_group(const float* logits) {
  Vec highest = splat(-kInfinity);
  for (int i = 0; i < kGroup; i += kLanes) {
    const Vec z = load(logits + i, Whole{});
    highest = larger(z < kInfinity ? z : splat(kInfinity), highest);
  }
  return largest_of(highest);
}

// Turns one logit of each of `count` groups into its score if it arrives first, plus a slack.
void score_first(const Groups& groups, int64_t count, float temperature, float slack) {
  for_vectors(0, count, [&](int64_t group, auto extent) {
    const Vec earliest = inside_or(load(groups.first + group, extent), 1, extent);
    store(groups.bounds + group, load(groups.bounds + group, extent) / temperature - log(earliest) + slack, extent);
  });
}

// The token of the best score, or none; only the logits of groups that are not out are read.
int64_t draw(const Noise& noise, const float* logits, const Groups& groups, int64_t count, float temperature) {
  float best = -kInfinity;
  int64_t winner = kNoToken;
  for (int64_t drawn = 0; drawn < count; ++drawn) {
    const auto [bound, group] = find_largest(groups.bounds, count);
    if (!(bound >= best) || bound == -kInfinity || bound == kInfinity) break;
    groups.bounds[group] = -kInfinity;
    float scores[kGroup];
    noise.arrivals(group, groups.first[group], groups.places[group], scores);
    for (int i = 0; i < kGroup; i += kLanes) {
      const Vec z = load(logits + group * kGroup + i, Whole{});
      store(scores + i, z / temperature - log(load(scores + i, Whole{})), Whole{});
    }
    const Largest score = find_largest(scores, kGroup);
    if (score.value > best) best = score.value, winner = group * kGroup + score.place;
  }
  return winner;
}

Groups groups_at(float* memory, int64_t count) {
  return {memory, memory + count, reinterpret_cast<int32_t*>(memory + 2 * count)};
}

// Looks at the logits of some tokens of a row, from `first` on: makes the bounds of their groups, and keeps the logits
// of those whose bound reaches the best score known of a token that arrives first in its group. Overwrites what lies
// behind the logits in the last group.
void sieve(const Sample& a, int64_t first, int64_t tokens, const Noise& noise, const Groups& of_row, float* logits,
           float* kept, float* reached) {
  const int64_t count = rounded_up(tokens, kGroup) / kGroup, offset = first / kGroup;
  const Groups groups{of_row.first + offset, of_row.bounds + offset, of_row.places + offset};
  if (a.softcap) cap_logits(logits, tokens, a.softcap);
  for (int64_t i = tokens; i < count * kGroup; ++i) logits[i] = -kInfinity;
  for (int64_t i = 0; i < a.suppressed_count; ++i) {
    const int64_t place = a.suppressed[i] - first;
    if (place >= 0 && place < tokens) logits[place] = -kInfinity;
  }
  noise.first_arrivals(offset, rounded_up(count, 2), groups.first, groups.places);
  // At first, the bounds are the scores of the first arrivals.
  for (int64_t group = 0; group < count; ++group) groups.bounds[group] = logits[group * kGroup + groups.places[group]];
  score_first(groups, count, a.temperature, 0);
  const float score = find_largest(groups.bounds, count).value;
  if (score > *reached) *reached = score;
  for (int64_t group = 0; group < count; ++group) groups.bounds[group] = largest_in_group(logits + group * kGroup);
  score_first(groups, count, a.temperature, kSlack);
  for (int64_t group = 0; group < count; ++group) {
    if (groups.bounds[group] >= *reached) {
      memcpy(kept + (offset + group) * kGroup, logits + group * kGroup, kGroup * sizeof *logits);
    } else {
      groups.bounds[group] = -kInfinity;
    }
  }
}

}  // namespace

void sample_rows(const SampleRows& a) {
  const int64_t size = a.groups * kGroup, even = rounded_up(a.groups, 2);
  const bool filtered = a.top_k || a.top_p < 1;
  const Scratch scratch(3 * even + (filtered ? size : 0), a.threads);
  for_rows(a.rows, useful_threads(a.rows, 2 * size, a.threads), [&](int64_t row, int thread) {
    float* logits = a.logits + row * size;
    const Groups groups = groups_at(scratch.of_thread(thread), even);
    const auto find_bounds = [&] {
      for (int64_t i = 0; i < a.groups; ++i) groups.bounds[i] = largest_in_group(logits + i * kGroup);
    };
    const Noise noise{(uint64_t)a.seed, (uint64_t)(a.first_row + row)};
    if (a.softcap) cap_logits(logits, size, a.softcap);
    for (int64_t i = 0; i < a.suppressed_count; ++i) logits[a.suppressed[i]] = -kInfinity;
    find_bounds();
    if (filtered && find_largest(groups.bounds, a.groups).value < kInfinity) {
      keep_most_likely(a, logits, scratch.of_thread(thread) + 3 * even);
      find_bounds();
    }
    noise.first_arrivals(0, even, groups.first, groups.places);
    score_first(groups, a.groups, a.temperature, kSlack);
    a.tokens[row] = draw(noise, logits, groups, a.groups, a.temperature);
  });
}

// Logits are made block by block. A block stays in the L2 cache; of the weight, 2 MiB for every thread are packed at a
// time, for the L3 cache.
constexpr int64_t kRowsOfABlock = 8 * kTileRows, kMostTokensOfABlock = 16 * kGroup, kPackedOfAThread = 1 << 19;

template <class T>
void linear_sample(const LinearSample<T>& a) {
  const int64_t count = rounded_up(a.vocabulary, kGroup) / kGroup, even = rounded_up(count, 2);
  const Scratch known(3 * even * a.rows, 1), reached(a.rows, a.threads);
  const auto groups_of = [&](int64_t row) { return groups_at(known.of_thread(0) + 3 * even * row, even); };
  const auto noise_of = [&](int64_t row) { return Noise{(uint64_t)a.seed, (uint64_t)(a.first_row + row)}; };
  for (int thread = 0; thread < a.threads; ++thread) {
    for (int64_t row = 0; row < a.rows; ++row) reached.of_thread(thread)[row] = -kInfinity;
  }

  // A block begins with an even group; there are two for every thread, if that takes no smaller ones.
  const int64_t most = rounded_up(a.threads * kPackedOfAThread / a.size + 1, kMostTokensOfABlock);
  const int64_t packed = smaller(most, even * kGroup), down = rounded_up(a.rows, kRowsOfABlock) / kRowsOfABlock;
  const int64_t width = smaller(rounded_up(packed * down / (2 * a.threads) + 1, 2 * kGroup), kMostTokensOfABlock);
  const Scratch blocks(kRowsOfABlock * width, a.threads);
  const Scratch left(LeftPanels::size(a.rows, a.size), 1), right(RightPanels::size(packed, a.size), 1);
  LeftPanels hidden(left.of_thread(0), a.size);
  RightPanels weight(right.of_thread(0), a.size);
  hidden.pack(a.hidden, 0, a.rows, a.threads);
  for (int64_t first = 0; first < a.vocabulary; first += packed) {
    const int64_t tokens = smaller(packed, a.vocabulary - first), across = rounded_up(tokens, width) / width;
    weight.pack(a.weight, first, tokens, a.threads);
    for_rows(down * across, a.threads, [&](int64_t block, int thread) {
      const int64_t row = block / across * kRowsOfABlock, place = block % across * width;
      const int64_t rows = smaller(kRowsOfABlock, a.rows - row), inside = smaller(width, tokens - place);
      float* logits = blocks.of_thread(thread);
      multiply(hidden, row, rows, weight, place, inside, logits, width);
      for (int64_t i = row; i < row + rows; ++i, logits += width) {
        sieve(a, first + place, inside, noise_of(i), groups_of(i), logits, a.logits + i * count * kGroup,
              reached.of_thread(thread) + i);
      }
    });
  }
  for_rows(a.rows, a.threads, [&](int64_t row, int) {
    a.tokens[row] = draw(noise_of(row), a.logits + row * count * kGroup, groups_of(row), count, a.temperature);
  });
}

template void linear_sample(const LinearSample<float>&);
template void linear_sample(const LinearSample<BFloat16>&);

}  // namespace quietstar::cpu::QUIETSTAR_ISA
