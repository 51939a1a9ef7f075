// The forward of thought attention for a sampling step, and for decoding with a long cache.
//
// Layout: the rows of one key/value head are (anchor, step, head of the group), anchor-major, and a block takes up to
// 128 of them, 16 per warp. Keys come in tiles of 64: first those of the base sequence that any of the block's rows
// sees, then the thought keys, anchor-major. A warp skips tiles in which its rows see nothing, so the thought keys of
// other warps' anchors cost it only the barrier. With few rows, the tiles are split over blocks, and a second kernel
// combines the splits in fixed order (flash-decoding).
//
// Base tiles that all rows see completely have their own loop, without masks and thoughts. Another loop, with masks,
// runs before it for the edges of windows and padding, and after it for the anchors' edges and their thoughts.
//
// A row and key take 4 · D FLOPs, on tensor cores in half precision (float32: thought_attention_float.cuh). Each block
// reads 4 · D bytes per key; three tiles are in flight, 32 KiB each at D = 128. In a tile's row of 16-byte pieces,
// piece c is stored at c ^ (row mod 8), so that the eight rows that ldmatrix reads are in different banks.
#pragma once

#include "quietstar/thought_tiles.cuh"

namespace quietstar::cuda {

constexpr int kStages = 3;
constexpr int kRowsOfWarp = 16;
constexpr int kMostTileWarps = static_cast<int>(kTileRows) / kRowsOfWarp;

// The half-precision kernel for heads of at most kHead elements. kAligned: all keys, values and their strides are
// multiples of 16 bytes, and so is the head.
template <class T, int kHead, bool kAligned>
struct HalfAttention {
  static constexpr int kPieces = kHead / 8;  // of 16 bytes, in a row
  static constexpr int kSteps = kHead / 16;  // of the matrix units, along the head
  static constexpr int kTileBytes = kTileKeys * kHead * 2;
  static constexpr int kSharedBytes = kStages * 2 * kTileBytes;
  static_assert(kTileKeys * kPieces % (2 * kMostTileWarps * kWarpSize) == 0);  // a thread copies pieces two by two

  const ThoughtAttention& a;
  const AttentionHead& head;
  const TileList& list;
  unsigned char* const tiles;

  __device__ __forceinline__ unsigned char* stage(int tile, bool values) const {
    return tiles + ((tile % kStages) * 2 + values) * kTileBytes;
  }

  static __device__ __forceinline__ int offset(int key, int piece) {
    return key * kHead * 2 + (piece ^ (key & 7)) * 16;
  }

  // Starts to copy a tile to shared memory.
  __device__ __forceinline__ void fetch(int tile) const {
    if (tile < list.base_tiles) {
      fetch_base(tile);
    } else {
      if (tile < list.end) copy_tile<false>(tile);
      commit_copies();
    }
  }

  __device__ __forceinline__ void fetch_base(int tile) const {
    if (tile < list.end) copy_tile<true>(tile);
    commit_copies();
  }

  // Copies keys and values of a tile, but zeros for those that no row sees, since 0 · NaN is not 0. A thread always
  // takes the same piece of a vector, and gets from one of its keys to the next by additions.
  template <bool kBase>
  __device__ __forceinline__ void copy_tile(int tile) const {
    const int thread = static_cast<int>(threadIdx.x), piece = thread % kPieces;
    const int places = static_cast<int>(blockDim.x) / kPieces;  // from one of its keys to the next
    const int left[2] = {static_cast<int>(a.head_size) - piece * 8, static_cast<int>(a.value_size) - piece * 8};
    const std::uint64_t seen = list.seen<kBase>(a, head, tile);

    const Steps &keys = kBase ? a.key : a.thought_key, &values = kBase ? a.value : a.thought_value;
    const TileList::Place first = list.place(a, list.key(tile, thread / kPieces));
    const T* key = head.key<T>(keys, first.position_or_anchor, first.step) + piece * 8;
    const T* value = head.key<T>(values, first.position_or_anchor, first.step) + piece * 8;
    const int thought_steps = static_cast<int>(a.thought_steps);
    const int anchors = kBase ? places : places / thought_steps, steps = kBase ? 0 : places % thought_steps;
    const auto distance = [](const Steps& tensor, std::int64_t anchors, std::int64_t steps) {
      return anchors * tensor.anchor_stride + steps * tensor.step_stride;
    };
    const std::int64_t to_next[2] = {distance(keys, anchors, steps), distance(values, anchors, steps)};
    const std::int64_t to_anchor[2] = {distance(keys, 1, -thought_steps), distance(values, 1, -thought_steps)};

    int place = thread / kPieces, step = first.step;
    const auto go = [&](auto all_seen) {
      while (place < kTileKeys) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          unsigned char* const to = stage(tile, false) + offset(place, piece);
          const bool is_seen = decltype(all_seen)::value || (seen >> place & 1);
          copy(to, key, is_seen ? left[0] : 0);
          copy(to + kTileBytes, value, is_seen ? left[1] : 0);
          place += places;
          key += to_next[0];
          value += to_next[1];
          if constexpr (!kBase) {
            step += steps;
            if (step >= thought_steps) {
              step -= thought_steps;
              key += to_anchor[0];
              value += to_anchor[1];
            }
          }
        }
      }
    };
    if (kBase && seen == ~std::uint64_t{0}) {
      go(std::true_type{});
    } else {
      go(std::false_type{});
    }
  }

  // Copies a piece of a vector that has `left` more elements (perhaps none or a negative number), padded with zeros.
  static __device__ __forceinline__ void copy(unsigned char* to, const T* from, int left) {
    if constexpr (kAligned) {
      copy_async(to, from, left > 0);
    } else {
      Vector<T, 8> vector;
#pragma unroll
      for (int i = 0; i < 8; ++i) vector.element[i] = i < left ? from[i] : T{0};
      store(reinterpret_cast<T*>(to), vector);
    }
  }
};

// A single block may use all registers of a multiprocessor; without the 1, ptxas spills on sm_100 to make room for two.
template <class T, int kHead, bool kAligned>
__global__ void __launch_bounds__(kMostTileWarps* kWarpSize, 1) half_attention_kernel(ThoughtAttention a) {
  using Attention = HalfAttention<T, kHead, kAligned>;
  constexpr int kSteps = Attention::kSteps;
  const BlockPlace place(a, static_cast<int>(blockDim.x) / kWarpSize * kRowsOfWarp);
  const AttentionHead& head = place.head;
  const TileList list = tile_list(a, place, static_cast<int>(blockDim.x) / 2);
  const Attention attention{a, head, list, dynamic_shared()};

  // A lane has rows lane / 4 and lane / 4 + 8 of the 16 rows of its warp: the tensor cores' layout of both queries and
  // sums.
  const int lane = lane_number(), pair = lane % 4 * 2;
  const int own_row = warp_number() * kRowsOfWarp + lane / 4;
  const int row[2] = {place.first_row + own_row, place.first_row + own_row + 8};
  const auto sight = [&](int r) -> const RowSight& { return static_shared<BlockSights>().row[own_row + r * 8]; };

  for (int i = 0; i < kStages - 1; ++i) attention.fetch(list.begin + i);

  std::uint32_t query[kSteps][4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const T* from = row[r] < head.rows ? head.query<T>(a, row[r]) : nullptr;
    const auto element = [&](int column) {
      return from && column < a.head_size ? static_cast<std::uint32_t>(from[column].bits) : 0u;
    };
    const auto both = [&](int column) {
      if constexpr (!kAligned) return element(column) | element(column + 1) << 16;
      return from && column < a.head_size ? *reinterpret_cast<const std::uint32_t*>(from + column) : 0u;
    };
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        query[k][half * 2 + r] = both(k * 16 + half * 8 + pair);
      }
    }
  }

  // From the first to the last key that any row of the warp sees: other tiles need no work.
  const auto range_of_warp = [](const KeyRange& upper, const KeyRange& lower) {
    KeyRange range = {min(upper.low, lower.low), max(upper.high, lower.high)};
    for (int distance = kWarpSize / 2; distance >= 4; distance /= 2) {  // four lanes share a row
      range.low = min(range.low, __shfl_xor_sync(kWholeWarp, range.low, distance));
      range.high = max(range.high, __shfl_xor_sync(kWholeWarp, range.high, distance));
    }
    return range;
  };
  const KeyRange base_range = range_of_warp(sight(0).base, sight(1).base);
  const KeyRange own_range = range_of_warp(sight(0).own, sight(1).own);

  float output[kHead / 8][4] = {};
  float largest[2] = {kLowest, kLowest}, sum[2] = {0, 0};
  const bool is_capped = a.mask.softcap != 0;
  const float to_log2 = (is_capped ? 1 : a.mask.scale) * kLog2E;  // a capped score has been scaled

  // Processes a tile of base keys that all rows see (rows that see nothing do no harm), or a tile of any keys.
  const auto attend = [&](int tile, auto is_full) {
    constexpr bool kFull = decltype(is_full)::value;
    float score[kTileKeys / 8][4] = {};
    const unsigned char* keys = attention.stage(tile, false);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int n = 0; n < kTileKeys / 16; ++n) {
        // Keys n · 16 + 0 ... 7 and 8 ... 15, with both halves of this step for each.
        std::uint32_t b[4];
        const int key = n * 16 + lane / 16 * 8 + lane % 8;
        load_matrices<false>(b, keys + Attention::offset(key, k * 2 + lane / 8 % 2));
        const std::uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        multiply_accumulate<T>(score[2 * n], query[k], first);
        multiply_accumulate<T>(score[2 * n + 1], query[k], second);
      }
    }
    if (is_capped) {
#pragma unroll
      for (auto& of_keys : score) {
#pragma unroll
        for (float& s : of_keys) s = capped(s, a.mask);
      }
    }
    // The tile's keys that a row sees, counted from the lane's first key.
    int from[2] = {0, 0}, to[2] = {0, 0};
    if constexpr (!kFull) {
      const auto [base, number] = list.key(tile, pair);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const KeyRange range = base ? sight(r).base : sight(r).own;
        from[r] = range.low - number;
        to[r] = range.high - number;
      }
    }
    float highest[2] = {largest[0], largest[1]};
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[n][i] *= to_log2;
        const int key = n * 8 + i % 2;
        if (!kFull && (key < from[i / 2] || key > to[i / 2])) score[n][i] = -kInfinity;
        highest[i / 2] = larger(highest[i / 2], score[n][i]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = largest_of_lanes(highest[r], 4);  // that share the row
      const float shrink = exp2_approximate(largest[r] - highest[r]);
      largest[r] = highest[r];
      sum[r] *= shrink;
#pragma unroll
      for (int n = 0; n < kHead / 8; ++n) {
        output[n][2 * r] *= shrink;
        output[n][2 * r + 1] *= shrink;
      }
    }
    const unsigned char* values = attention.stage(tile, true);
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k) {  // sixteen keys: two columns of scores are one operand
      std::uint32_t probability[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&s)[4] = score[2 * k + half];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[i] = exp2_approximate(s[i] - largest[i / 2]);
          sum[i / 2] += s[i];
        }
        probability[half * 2] = packed<T>(s[0], s[1]);
        probability[half * 2 + 1] = packed<T>(s[2], s[3]);
      }
#pragma unroll
      for (int n = 0; n < kHead / 16; ++n) {
        std::uint32_t b[4];
        load_matrices<true>(b, values + Attention::offset(k * 16 + lane % 16, n * 2 + lane / 16));
        const std::uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        multiply_accumulate<T>(output[2 * n], probability, first);
        multiply_accumulate<T>(output[2 * n + 1], probability, second);
      }
    }
  };

  // The loop of full tiles fetches base tiles only, so that it ends where thoughts would be next.
  const int last = list.end > list.base_tiles ? list.base_tiles - (kStages - 1) : list.end;
  const int begin = max(list.full_begin, list.begin), end = min(list.full_end, last);
  const int full_begin = begin < end ? begin : list.begin, full_end = begin < end ? end : list.begin;
  const auto arrived = [] {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the tile is visible to all, and all are done with the previous one, which the next overwrites
  };
  int tile = list.begin;
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    for (const int until = part == 0 ? full_begin : list.end; tile < until; ++tile) {
      arrived();
      attention.fetch(tile + kStages - 1);
      const auto [base, first] = list.key(tile, 0);
      if (base ? base_range.meets_tile(first) : own_range.meets_tile(first)) attend(tile, std::false_type{});
    }
    for (; tile < full_end; ++tile) {
      arrived();
      attention.fetch_base(tile + kStages - 1);
      if (base_range.high >= 0) attend(tile, std::true_type{});
    }
  }
  wait_for_copies<0>();

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] = sum_of_lanes(sum[r], 4);
    if (row[r] >= head.rows) continue;
    if (sight(r).nothing()) sum[r] = 0;
    const RowResult<T> result(a, head, row[r], place.split);
    const bool sees = sum[r] != 0;  // NaN does
    const float factor = sees ? 1 / sum[r] : 0;
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) {
      const int column = n * 8 + pair;
      const float first = sees ? output[n][2 * r] * factor : 0, second = sees ? output[n][2 * r + 1] * factor : 0;
      if (a.value_size % 2 == 0) {
        if (column < a.value_size) result.store_pair(column, first, second);
      } else {
        if (column < a.value_size) result.store(column, first);
        if (column + 1 < a.value_size) result.store(column + 1, second);
      }
    }
    if (lane % 4 == 0) *result.lse = natural_log_sum(largest[r], sum[r]);
  }
}

}  // namespace quietstar::cuda
