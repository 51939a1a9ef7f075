// What queries see, and the softcap on their scores.
#pragma once

#include "tile.h"

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// Keys first <= l < last.
struct Range {
  int64_t first, last;

  bool empty() const { return first >= last; }
};

// What the queries after one anchor see. Queries are numbered from 0, and thought keys like the T steps.
class Sight {
 public:
  Sight(const ThoughtShape& shape, int64_t batch, int64_t anchor)
      : mask_(shape.mask),
        position_(of_anchor(mask_.anchors, batch, anchor, anchor)),
        start_(of_anchor(mask_.key_start, batch, anchor, 0)),
        length_(of_anchor(mask_.thought_lengths, batch, anchor, shape.thought_steps)),
        first_step_(shape.thought_steps - shape.steps) {}

  // How many queries exist: the first ones.
  int64_t queries() const { return position_ < 0 ? 0 : greater(0, length_ - first_step_); }

  // The base keys and the thought keys that a query sees. No query sees more than the first one, except later thought
  // keys.
  Range base_keys(int64_t query) const {
    const int64_t behind = mask_.window_from_step ? 1 + first_step_ + query : 0;
    return {greater(start_, position_ + behind - mask_.window + 1), position_ + 1};
  }
  Range thought_keys(int64_t query) const {
    const int64_t step = first_step_ + query;
    return {mask_.window_from_step ? greater(0, step - mask_.window + 1) : 0, mask_.causal ? step + 1 : length_};
  }

  // The thought keys that any query sees, if there is one.
  Range thought_keys() const { return {thought_keys(0).first, length_}; }

 private:
  static int64_t of_anchor(const PerAnchor& numbers, int64_t batch, int64_t anchor, int64_t other) {
    return numbers.data ? numbers.data[batch * numbers.batch_stride + anchor * numbers.anchor_stride] : other;
  }

  const ThoughtMask& mask_;
  int64_t position_, start_, length_, first_step_;
};

// Turns products x into scores c tanh(scale x / c), in place, and computes, if slopes are needed, their derivatives by
// x, in the layout of the scores.
inline void cap(Rows products, int64_t rows, int64_t width, const ThoughtMask& mask, float* slopes = nullptr) {
  const float inner = mask.scale / mask.softcap;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = row * products.stride; column < row * products.stride + width; column += kLanes) {
      const Vec curve = tanh(load(products.data + column, Whole{}) * inner);
      store(products.data + column, curve * mask.softcap, Whole{});
      if (slopes) store(slopes + column, (1 - curve * curve) * mask.scale, Whole{});
    }
  }
}

inline void multiply_by(const float* slopes, Rows gradients, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = row * gradients.stride; column < row * gradients.stride + width; column += kLanes) {
      store(gradients.data + column, load(gradients.data + column, Whole{}) * load(slopes + column, Whole{}), Whole{});
    }
  }
}

}  // namespace
}  // namespace quietstar::cpu::QUIETSTAR_ISA
