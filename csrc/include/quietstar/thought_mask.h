// Which keys the queries of thought attention see, and how scores are scaled and capped; see thought_attention/api.py.
#pragma once

#include <cstdint>

namespace quietstar {

// Integers [B, P] with stride 1, or 0 (all the same), in the last dimension; null if they are not given.
struct PerAnchor {
  const std::int64_t* data;
  std::int64_t batch_stride, anchor_stride;  // the latter 1 or 0
};

struct ThoughtMask {
  PerAnchor anchors;          // null: 0, 1, 2, ...
  PerAnchor key_start;        // null: 0
  PerAnchor thought_lengths;  // null: T
  std::int64_t window;        // kNoWindow: none
  bool window_from_step, causal;
  float scale, softcap;  // no softcap: 0

  static constexpr std::int64_t kNoWindow = INT64_MAX / 2;  // may be taken from a position
};

}  // namespace quietstar
