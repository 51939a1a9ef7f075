// Attention of thoughts without gradients: for a sampling step, and for decoding behind a long cache.
//
// Layout: the rows of one key/value head are (anchor, step, head of the group), anchor-major, and a block takes up to
// 128 of them, 16 a warp. Its keys come in tiles of 64: first those of the base sequence that any of its rows sees,
// then those of the thought keys, anchor-major. A warp leaves out tiles in which its rows see nothing, so the
// thought keys of other warps' anchors cost it nothing but the barrier. With few rows the tiles are split over blocks,
// and a second kernel adds up the splits, in fixed order (flash-decoding).
//
// 4 · D FLOP for each row and key, on the matrix units in half precision (float32: thought_attention_float.cuh). Each
// block reads 4 · D bytes a key; three tiles are under way, 32 KiB each at D = 128. Of a tile's row of 16-byte pieces,
// piece c lies at c ^ (row mod 8), so that the eight rows that ldmatrix takes lie in different banks.
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

  // Brings keys and values of a tile to shared memory, zeros for those that no row sees: 0 · NaN would not be 0.
  __device__ __forceinline__ void fetch(int tile) const {
    if (tile < list.end) {
      for (int i = threadIdx.x; i < kTileKeys * kPieces; i += blockDim.x) {
        const int place = i / kPieces, piece = i % kPieces;
        const TileList::Key key = list.key(tile, place);
        const bool seen = list.seen(a, head, key);
        const Steps &keys = key.base ? a.key : a.thought_key, &values = key.base ? a.value : a.thought_value;
        const TileList::Place of_key = list.place(a, key);
        const auto at = [&](const Steps& tensor) {
          return head.key<T>(tensor, of_key.position_or_anchor, of_key.step) + piece * 8;
        };
        copy(stage(tile, false) + offset(place, piece), keys, at, seen, a.head_size - piece * 8);
        copy(stage(tile, true) + offset(place, piece), values, at, seen, a.value_size - piece * 8);
      }
    }
    commit_copies();
  }

  // A piece of a vector that ends `left` elements behind where the piece begins.
  template <class At>
  __device__ __forceinline__ void copy(unsigned char* to, const Steps& tensor, At& at, bool seen,
                                       std::int64_t left) const {
    if constexpr (kAligned) {
      const bool inside = seen && left > 0;
      copy_async(to, inside ? at(tensor) : static_cast<const T*>(tensor.data), inside);
    } else {
      Vector<T, 8> vector;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        vector.element[i] = seen && i < left ? at(tensor)[i] : T{0};
      }
      store(reinterpret_cast<T*>(to), vector);
    }
  }
};

template <class T, int kHead, bool kAligned>
__global__ void __launch_bounds__(kMostTileWarps* kWarpSize) half_attention_kernel(ThoughtAttention a) {
  using Attention = HalfAttention<T, kHead, kAligned>;
  constexpr int kSteps = Attention::kSteps;
  const BlockPlace place(a, static_cast<int>(blockDim.x) / kWarpSize * kRowsOfWarp);
  const AttentionHead& head = place.head;
  const TileList list = tile_list(a, head, place.first_row, place.end_row, place.split);
  const Attention attention{a, head, list, dynamic_shared()};

  // Of the 16 rows of its warp, a lane has lane / 4 and that + 8: in the layout of the matrix units, both of queries
  // and of sums.
  const int lane = lane_number(), pair = lane % 4 * 2;
  const int upper_row = place.first_row + warp_number() * kRowsOfWarp + lane / 4, row[2] = {upper_row, upper_row + 8};
  const RowSight sight[2] = {head.sight(a, row[0]), head.sight(a, row[1])};

  for (int i = 0; i < kStages - 1; ++i) attention.fetch(list.begin + i);

  std::uint32_t query[kSteps][4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const T* from = row[r] < head.rows ? head.query<T>(a, row[r]) : nullptr;
    const auto element = [&](int column) {
      return from && column < a.head_size ? static_cast<std::uint32_t>(from[column].bits) : 0u;
    };
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = k * 16 + half * 8 + pair;
        query[k][half * 2 + r] = element(column) | element(column + 1) << 16;
      }
    }
  }

  // What all rows of the warp see, and what any of them does: most tiles need no mask, or no work.
  int low = INT32_MAX, high = -1, all_low = 0, all_high = INT32_MAX, own_low = INT32_MAX, own_high = -1;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (sight[r].low <= sight[r].high) low = min(low, sight[r].low);
    high = max(high, sight[r].high);
    all_low = max(all_low, sight[r].low);
    all_high = min(all_high, sight[r].high);
    if (sight[r].own_low <= sight[r].own_high) own_low = min(own_low, sight[r].own_low);
    own_high = max(own_high, sight[r].own_high);
  }
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    low = min(low, __shfl_xor_sync(kWholeWarp, low, distance));
    high = max(high, __shfl_xor_sync(kWholeWarp, high, distance));
    all_low = max(all_low, __shfl_xor_sync(kWholeWarp, all_low, distance));
    all_high = min(all_high, __shfl_xor_sync(kWholeWarp, all_high, distance));
    own_low = min(own_low, __shfl_xor_sync(kWholeWarp, own_low, distance));
    own_high = max(own_high, __shfl_xor_sync(kWholeWarp, own_high, distance));
  }

  float output[kHead / 8][4] = {};
  float largest[2] = {kLowest, kLowest}, sum[2] = {0, 0};
  const bool is_capped = a.mask.softcap != 0;
  const float to_log2 = (is_capped ? 1 : a.mask.scale) * kLog2E;  // a capped score has been scaled

  for (int tile = list.begin; tile < list.end; ++tile) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the tile is there for all, and all are done with the one before, which the next overwrites
    attention.fetch(tile + kStages - 1);

    const auto [base, valid, first_key] = list.key(tile, 0);
    const bool needed = base ? first_key <= high && first_key + kTileKeys > low
                             : first_key <= own_high && first_key + kTileKeys > own_low;
    if (!needed) continue;
    const bool masked = !base || first_key < all_low || first_key + kTileKeys - 1 > all_high;

    float score[kTileKeys / 8][4] = {};
    const unsigned char* keys = attention.stage(tile, false);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int n = 0; n < kTileKeys / 16; ++n) {
        // Keys n · 16 + 0 ... 7 and 8 ... 15, of each the two halves of this step.
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
    float highest[2] = {largest[0], largest[1]};
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[n][i] *= to_log2;
        if (masked && !sight[i / 2].sees(base, first_key + n * 8 + pair + i % 2)) score[n][i] = -kInfinity;
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
  }
  wait_for_copies<0>();

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] = sum_of_lanes(sum[r], 4);
    if (row[r] >= head.rows) continue;
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
