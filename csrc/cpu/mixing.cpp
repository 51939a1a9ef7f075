// mix_logits and mixed_cross_entropy: both logits rows are read once per pass, and the mix never written unless it is
// the result.
//
// Bytes per logit, e the size of one: mix 3e, its backward 5e, cross-entropy 2e, its backward 4e.

#include "kernel_table.h"
#include "parallel.h"

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

inline IntVec is_infinite(Vec v) { return (v == kInfinity) | (v == -kInfinity); }

// z = (1 − w) b + w t of a row, −∞ if both are, where else −∞ of a weight of exactly 0 adds nothing; and t − b, of
// which infinities have no part.
//
// Where infinities are not asked for, they make what is summed over the row infinite or NaN. Rows with them are few, so
// they are asked for once that has come out.
template <bool kWithInfinities>
struct RowMix {
  float weight;

  Vec difference(Vec b, Vec t) const {
    const Vec difference = t - b;
    if constexpr (!kWithInfinities) return difference;
    return is_infinite(b) | is_infinite(t) ? Vec{} : difference;
  }

  Vec mixed(Vec b, Vec t) const {
    const Vec z = (1 - weight) * b + weight * t;
    if constexpr (!kWithInfinities) return z;
    const float of_base = weight == 1 ? 0 : (weight - 1) * kInfinity,
                of_thought = weight == 0 ? 0 : -weight * kInfinity;
    const Vec without_thought = t == -kInfinity ? b + of_thought : z;
    return b == -kInfinity ? (t == -kInfinity ? t : t + of_base) : without_thought;
  }
};

// Calls pass(RowMix), which returns a sum of what it made; then, if that is not finite, once more.
template <class Pass>
void with_infinities_if_needed(float weight, Pass pass) {
  const float sum = pass(RowMix<false>{weight});
  if (!(sum - sum == 0)) pass(RowMix<true>{weight});
}

}  // namespace

template <class T>
void mix(const MixForward<T>& a) {
  for_rows(a.rows, useful_threads(a.rows, a.vocabulary, a.threads), [&](int64_t row, int) {
    const T *base = a.base.row(row), *thought = a.thought.row(row);
    T* mixed = a.mixed + row * a.vocabulary;
    with_infinities_if_needed(a.weight[row], [&](auto mix) {
      Vec sum{};
      for_vectors(0, a.vocabulary, [&](int64_t v, auto extent) {
        const Vec z = mix.mixed(load(base + v, extent), load(thought + v, extent));
        sum += z;
        store(mixed + v, z, extent);
      });
      return sum_of(sum);
    });
  });
}

template <class T>
void mix_backward(const MixBackward<T>& a) {
  for_rows(a.rows, useful_threads(a.rows, a.vocabulary, a.threads), [&](int64_t row, int) {
    const T *base = a.base.row(row), *thought = a.thought.row(row), *grad = a.grad.row(row);
    const float weight = a.weight[row];
    if (a.d_weight) {
      with_infinities_if_needed(weight, [&](auto mix) {
        double total = 0;
        for_blocks(a.vocabulary, [&](int64_t begin, int64_t end) {
          Vec sum{};
          for_vectors(begin, end, [&](int64_t v, auto extent) {
            sum += load(grad + v, extent) * mix.difference(load(base + v, extent), load(thought + v, extent));
          });
          total += sum_of(sum);
        });
        return a.d_weight[row] = (float)total;
      });
    }
    const auto write = [&](T* gradient, float factor) {
      for_vectors(0, a.vocabulary,
                  [&](int64_t v, auto extent) { store(gradient + v, load(grad + v, extent) * factor, extent); });
    };
    if (a.d_base) write(a.d_base + row * a.vocabulary, 1 - weight);
    if (a.d_thought) write(a.d_thought + row * a.vocabulary, weight);
  });
}

// Σ exp(z − top) and Σ exp(z − top) (t − b) over a row, block by block; a new maximum scales what was summed before.
template <class T>
void mixed_cross_entropy(const MixedCrossEntropy<T>& a) {
  for_rows(a.rows, useful_threads(a.rows, 2 * a.vocabulary, a.threads), [&](int64_t row, int) {
    const T *base = a.base.row(row), *thought = a.thought.row(row);
    with_infinities_if_needed(a.weight[row], [&](auto mix) {
      float top = kLowest;
      double total = 0, moment = 0;
      for_blocks(a.vocabulary, [&](int64_t begin, int64_t end) {
        Vec highest = splat(top);
        for_vectors(begin, end, [&](int64_t v, auto extent) {
          const Vec z = mix.mixed(load(base + v, extent), load(thought + v, extent));
          highest = larger(inside_or(z, kLowest, extent), highest);
        });
        const float risen = largest_of(highest);
        if (risen > top) {
          const float shrink = exp(top - risen);
          total *= shrink;
          moment *= shrink;
          top = risen;
        }
        Vec sum{}, weighted{};
        for_vectors(begin, end, [&](int64_t v, auto extent) {
          const Vec b = load(base + v, extent), t = load(thought + v, extent);
          const Vec e = exp(inside_or(mix.mixed(b, t), -kInfinity, extent) - top);
          sum += e;
          weighted += e * mix.difference(b, t);
        });
        total += sum_of(sum);
        moment += sum_of(weighted);
      });
      const Vec b = splat(load_one(base + a.target[row])), t = splat(load_one(thought + a.target[row]));
      a.largest[row] = top;
      a.log_total[row] = logf((float)total);
      a.nll[row] = a.log_total[row] - (mix.mixed(b, t)[0] - top);
      return a.slope[row] = (float)(moment / total) - mix.difference(b, t)[0];
    });
  });
}

template <class T>
void mixed_cross_entropy_backward(const MixedCrossEntropyBackward<T>& a) {
  for_rows(a.rows, useful_threads(a.rows, 2 * a.vocabulary, a.threads), [&](int64_t row, int) {
    const T *base = a.base.row(row), *thought = a.thought.row(row);
    T* d_base = a.d_base ? a.d_base + row * a.vocabulary : nullptr;
    T* d_thought = a.d_thought ? a.d_thought + row * a.vocabulary : nullptr;
    const float weight = a.weight[row], scale = a.scale[row], top = a.largest[row], log_total = a.log_total[row];
    if (scale == 0) {  // whatever the logits of such a row are: they may not even be finite
      if (d_base) memset(d_base, 0, a.vocabulary * sizeof(T));
      if (d_thought) memset(d_thought, 0, a.vocabulary * sizeof(T));
      return;
    }
    const auto write = [&](int64_t v, Vec gradient, auto extent) {
      if (d_base) store(d_base + v, gradient * (1 - weight), extent);
      if (d_thought) store(d_thought + v, gradient * weight, extent);
    };
    with_infinities_if_needed(weight, [&](auto mix) {
      const auto probability = [&](Vec b, Vec t) { return exp(mix.mixed(b, t) - top - log_total); };
      Vec sum{};
      for_vectors(0, a.vocabulary, [&](int64_t v, auto extent) {
        const Vec gradient = probability(load(base + v, extent), load(thought + v, extent)) * scale;
        sum += inside_or(gradient, 0, extent);
        write(v, gradient, extent);
      });
      const int64_t target = a.target[row];  // p − 1, formed before any rounding to a narrower dtype
      const Vec p = probability(splat(load_one(base + target)), splat(load_one(thought + target)));
      write(target, p * scale - scale, Part{1});
      return sum_of(sum);
    });
  });
}

template void mix(const MixForward<float>&);
template void mix(const MixForward<BFloat16>&);
template void mix_backward(const MixBackward<float>&);
template void mix_backward(const MixBackward<BFloat16>&);
template void mixed_cross_entropy(const MixedCrossEntropy<float>&);
template void mixed_cross_entropy(const MixedCrossEntropy<BFloat16>&);
template void mixed_cross_entropy_backward(const MixedCrossEntropyBackward<float>&);
template void mixed_cross_entropy_backward(const MixedCrossEntropyBackward<BFloat16>&);

}  // namespace quietstar::cpu::QUIETSTAR_ISA
