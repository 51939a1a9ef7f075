// The row kernel of sampling: one token for every row of a chunk of logits, with the noise of noise.cuh.
//
// Drawing the noise of a token takes about 80 instructions, several times the cost of reading its logit, so groups of
// tokens that cannot win are not drawn. A row has one block, which reads it once, 4 bytes per logit, and bounds the
// scores of each group by its largest logit and its first arrival. Then half-warps race: each draws its groups in the
// order of these bounds, until none reaches the best score in the block. The order in which groups are drawn depends on
// timing, but the winner does not.
//
// top_k and top_p keep the logits from a threshold on. It is found by bisecting the bits of floats, among candidates
// in shared memory: the logits that are not certain to be below it, usually few. Weights of top_p are summed as
// integers, so that the order of summation cannot decide a tie.
#pragma once

#include "quietstar/cuda_kernels.h"
#include "quietstar/elements.cuh"
#include "quietstar/noise.cuh"
#include "quietstar/reduce.cuh"

namespace quietstar::cuda {

constexpr int kSampleThreads = 256, kTeamLanes = 16;
constexpr int kTeams = kSampleThreads / kTeamLanes;
constexpr int kTeamWidth = kGroup / kTeamLanes;  // tokens of a lane
constexpr int kMostCandidates = 3072;

// Returned if no token can be drawn: see linear_sample/inputs.py.
constexpr std::int64_t kNoToken = -1;

// Added to bounds, because logarithms are not monotonic to the last bit; their error is far smaller than this.
constexpr float kSlack = 1e-5f;

// Converts float32 to an integer of the same order; both zeros become the same.
__device__ __forceinline__ std::uint32_t order_of(float x) {
  const std::uint32_t bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float float_of(std::uint32_t order) {
  return __uint_as_float(order >> 31 ? order & 0x7FFFFFFFu : ~order);
}

struct SampleShared {
  float largest[kMostWarps];
  unsigned long long sum;
  std::uint32_t best;  // score, in order; +∞ if the row has no token
  unsigned candidate_count;
  float team_score[kTeams];
  std::int64_t team_token[kTeams];
  float candidate[kMostCandidates];
};

__device__ __forceinline__ SampleShared& sample_shared() { return static_shared<SampleShared>(); }

__device__ __forceinline__ float largest_in_block(const float* values, std::int64_t count) {
  SampleShared& shared = sample_shared();
  float largest = -kInfinity;
  for (std::int64_t i = threadIdx.x; i < count; i += kSampleThreads) largest = larger(values[i], largest);
  largest = largest_of_lanes(largest);
  if (lane_number() == 0) shared.largest[warp_number()] = largest;
  __syncthreads();
  const int lane = lane_number();
  return largest_of_lanes(lane < kSampleThreads / kWarpSize ? shared.largest[lane] : -kInfinity);
}

// Numbers, and what each weighs: 1, or 2^40 · exp((x − largest) / temperature).
struct Weighed {
  const float* values;
  std::int64_t count;
  bool by_probability;
  float largest, temperature;

  __device__ __forceinline__ unsigned long long weight(float x) const {
    if (!by_probability) return 1;
    if (!(x > -kInfinity)) return 0;
    return static_cast<unsigned long long>(exp2_approximate((x - largest) / temperature * kLog2E) * 0x1p40f);
  }

  // The weight of all numbers that are at least `order`.
  __device__ __forceinline__ unsigned long long from(std::uint32_t order) const {
    SampleShared& shared = sample_shared();
    unsigned long long sum = 0;
    for (std::int64_t i = threadIdx.x; i < count; i += kSampleThreads) {
      const float x = values[i];
      if (order_of(x) >= order) sum += weight(x);
    }
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, distance);
    __syncthreads();  // the sum of the last call has been read
    if (threadIdx.x == 0) shared.sum = 0;
    __syncthreads();
    if (lane_number() == 0) atomicAdd(&shared.sum, sum);
    __syncthreads();
    return shared.sum;
  }

  // The largest number from which on all numbers together weigh `limit` or more; the lowest if they never do.
  __device__ __forceinline__ std::uint32_t cut(unsigned long long limit) const {
    std::uint32_t low = order_of(-kInfinity), high = order_of(largest);
    while (low < high) {
      const std::uint32_t middle = low + (high - low + 1) / 2;
      if (from(middle) >= limit) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  // The same numbers without those below `floor`, from shared memory if they fit there.
  __device__ __forceinline__ Weighed only_from(std::uint32_t floor) const {
    SampleShared& shared = sample_shared();
    __syncthreads();
    if (threadIdx.x == 0) shared.candidate_count = 0;
    __syncthreads();
    for (std::int64_t i = threadIdx.x; i < count; i += kSampleThreads) {
      const float x = values[i];
      if (order_of(x) < floor) continue;
      const unsigned place = atomicAdd(&shared.candidate_count, 1u);
      if (place < kMostCandidates) shared.candidate[place] = x;
    }
    __syncthreads();
    if (shared.candidate_count > kMostCandidates) return *this;
    Weighed few = *this;
    few.values = shared.candidate;
    few.count = shared.candidate_count;
    return few;
  }
};

// The smallest logit that may be drawn: see keep_most_likely in linear_sample/reference.py. Any number if the row has
// no token.
__device__ __forceinline__ float threshold(const SampleRows& a, const float* logits, const float* group_largest) {
  const std::int64_t size = a.groups * kGroup;
  const float largest = largest_in_block(group_largest, a.groups);
  if (!(largest < kInfinity)) return -kInfinity;
  Weighed all{logits, size, false, largest, a.temperature};
  std::uint32_t cut = order_of(-kInfinity);
  if (a.top_k != 0) {
    // The k-th largest logit is no smaller than the k-th largest of the groups' largest.
    const Weighed groups{group_largest, a.groups, false, largest, a.temperature};
    const std::uint32_t floor = groups.cut(static_cast<unsigned long long>(a.top_k));
    cut = all.only_from(floor).cut(static_cast<unsigned long long>(a.top_k));
  }
  if (a.top_p < 1) {
    all.by_probability = true;
    const unsigned long long total = all.from(cut);
    const auto limit = static_cast<unsigned long long>(ceil(a.top_p * static_cast<double>(total)));
    // Logits so far below the largest together weigh too little to be needed.
    const float spare = static_cast<float>(total - limit) * 0x1p-40f / static_cast<float>(size);
    const float floor = spare > 0 ? largest + 1.001f * a.temperature * logf(spare) - 1e-3f : -kInfinity;
    const std::uint32_t kept = max(cut, order_of(min(floor, largest)));
    cut = max(cut, all.only_from(kept).cut(limit));
  }
  return float_of(cut);
}

// The best score of some tokens, and the lowest token that has it.
struct Best {
  float score = -kInfinity;
  std::int64_t token = 0;

  __device__ __forceinline__ void take(float other_score, std::int64_t other_token) {
    const bool better = other_score > score || (other_score == score && other_token < token);
    score = better ? other_score : score;
    token = better ? other_token : token;
  }

  // Among the lanes of a team.
  __device__ __forceinline__ void share() {
    for (int distance = kTeamLanes / 2; distance > 0; distance /= 2) {
      const float other_score = __shfl_xor_sync(kWholeWarp, score, distance);
      take(other_score, __shfl_xor_sync(kWholeWarp, token, distance));
    }
  }
};

template <bool kFiltered, bool kCapped>
__global__ void __launch_bounds__(kSampleThreads, 4) sample_kernel(SampleRows a) {
  constexpr int kInFlight = 4;
  SampleShared& shared = sample_shared();
  float* const bounds = reinterpret_cast<float*>(dynamic_shared());  // of the groups, an even number of them
  float* const logits = a.logits + blockIdx.x * a.groups * kGroup;
  const Noise noise{static_cast<std::uint64_t>(*a.seed), static_cast<std::uint64_t>(a.first_row + blockIdx.x)};
  const int team = static_cast<int>(threadIdx.x) / kTeamLanes, member = static_cast<int>(threadIdx.x) % kTeamLanes;
  const auto tokens_of = [&](std::int64_t group) { return group * kGroup + member * kTeamWidth; };

  if constexpr (kCapped) {
    for (std::int64_t i = threadIdx.x * std::int64_t{4}; i < a.groups * kGroup; i += kSampleThreads * 4) {
      Vector<float, 4> z = load<4>(logits + i);
#pragma unroll
      for (float& element : z.element) element = capped(element, a.softcap);
      store(logits + i, z);
    }
    __syncthreads();
  }
  for (std::int64_t begin = 0; begin < a.groups; begin += kTeams * kInFlight) {  // the same for all lanes
    Vector<float, kTeamWidth> z[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const std::int64_t group = min(begin + j * kTeams + team, a.groups - 1);
      z[j] = load<kTeamWidth>(logits + tokens_of(group));
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      float largest = -kInfinity;  // +∞ also if one is NaN
#pragma unroll
      for (int i = 0; i < kTeamWidth; ++i) {
        largest = larger(largest, z[j].element[i] < kInfinity ? z[j].element[i] : kInfinity);
      }
      largest = largest_of_lanes(largest, kTeamLanes);
      const std::int64_t group = begin + j * kTeams + team;
      if (member == 0 && group < a.groups + a.groups % 2) bounds[group] = largest;
    }
  }
  if (threadIdx.x == 0) shared.best = order_of(-kInfinity);
  __syncthreads();
  const float smallest = kFiltered ? threshold(a, logits, bounds) : -kInfinity;
  if (kFiltered) __syncthreads();
  for (std::int64_t pair = threadIdx.x; 2 * pair < a.groups; pair += kSampleThreads) {
    const Noise::First first = noise.of_groups(static_cast<std::uint32_t>(pair));
    Vector<float, 2> both = load<2>(bounds + 2 * pair);  // the last may hold a group twice
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float largest = both.element[i];
      both.element[i] = largest >= smallest ? largest / a.temperature - logf(first.time[i]) + kSlack : -kInfinity;
      if (both.element[i] == kInfinity && 2 * pair + i < a.groups) atomicMax(&shared.best, order_of(kInfinity));
    }
    store(bounds + 2 * pair, both);
  }
  __syncthreads();

  // Team by team sixteen groups, in turn.
  Best winner;
  while (true) {
    Best next;  // the group of this team with the largest bound
    next.token = a.groups;
    for (std::int64_t group = threadIdx.x; group < a.groups; group += kSampleThreads) {
      next.take(bounds[group], group);
    }
    next.share();
    const float best = float_of(atomicMax(&shared.best, 0u));
    const bool goes_on = next.score > -kInfinity && next.score >= best && best < kInfinity;
    if (!__any_sync(kWholeWarp, goes_on)) break;
    // A team that is done continues along with the other of its warp, without effect.
    const std::int64_t group = goes_on ? next.token : 0;
    const Noise::First first = noise.of_groups(static_cast<std::uint32_t>(group / 2));
    const float first_time = group % 2 ? first.time[1] : first.time[0];
    const int first_place = group % 2 ? first.place[1] : first.place[0];
    const Words words = noise.of_tokens(static_cast<std::uint32_t>(group * kCallsOfGroup + member));
    const Vector<float, kTeamWidth> z = load<kTeamWidth>(logits + tokens_of(group));
    Best drawn;
    drawn.token = tokens_of(group);
#pragma unroll
    for (int i = 0; i < kTeamWidth; ++i) {
      const bool is_first = member * kTeamWidth + i == first_place;
      const float time = is_first ? first_time : first_time + Noise::exponential(words.word[i]);
      if (z.element[i] >= smallest) drawn.take(z.element[i] / a.temperature - logf(time), tokens_of(group) + i);
    }
    drawn.share();
    if (goes_on) winner.take(drawn.score, drawn.token);
    if (goes_on && member == 0) {
      bounds[group] = -kInfinity;
      atomicMax(&shared.best, order_of(drawn.score));
    }
    __syncwarp();
  }
  if (member == 0) {
    shared.team_score[team] = winner.score;
    shared.team_token[team] = winner.token;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int other = 1; other < kTeams; ++other) winner.take(shared.team_score[other], shared.team_token[other]);
  a.tokens[blockIdx.x] = winner.score > -kInfinity ? winner.token : kNoToken;
}

}  // namespace quietstar::cuda
