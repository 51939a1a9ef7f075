// mix_logits and mixed_cross_entropy: both logits rows are read once per pass, and the mix never written unless it is
// the result.
//
// Bytes per logit, e the size of one: mix 3e, its backward 5e, cross-entropy 2e, its backward 4e.

#include "kernel_table.h"
#include "parallel.h"

namespace quietstar::cpu::QUIETSTAR_ISA {

template <class T>
void mix(const MixForward<T>& a) {
  for_rows(a.rows, useful_threads(a.rows, a.vocabulary, a.threads), [&](int64_t row, int) {
    const T *base = a.base.row(row), *thought = a.thought.row(row);
    T* mixed = a.mixed + row * a.vocabulary;
    const float weight = a.weight[row];
    for_vectors(0, a.vocabulary, [&](int64_t v, auto extent) {
      const Vec b = load(base + v, extent), t = load(thought + v, extent);
      store(mixed + v, (1 - weight) * b + weight * t, extent);
    });
  });
}

template <class T>
void mix_backward(const MixBackward<T>& a) {
  for_rows(a.rows, useful_threads(a.rows, a.vocabulary, a.threads), [&](int64_t row, int) {
    const T *base = a.base.row(row), *thought = a.thought.row(row), *grad = a.grad.row(row);
    const float weight = a.weight[row];
    if (a.d_weight) {
      double total = 0;
      for_blocks(a.vocabulary, [&](int64_t begin, int64_t end) {
        Vec sum{};
        for_vectors(begin, end, [&](int64_t v, auto extent) {
          sum += load(grad + v, extent) * (load(thought + v, extent) - load(base + v, extent));
        });
        total += sum_of(sum);
      });
      a.d_weight[row] = (float)total;
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
    const float weight = a.weight[row];
    float top = kLowest;
    double total = 0, moment = 0;
    for_blocks(a.vocabulary, [&](int64_t begin, int64_t end) {
      Vec highest = splat(top);
      for_vectors(begin, end, [&](int64_t v, auto extent) {
        const Vec b = load(base + v, extent);
        const Vec z = b + weight * (load(thought + v, extent) - b);
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
        const Vec b = load(base + v, extent), difference = load(thought + v, extent) - b;
        const Vec e = exp(inside_or(b + weight * difference, -kInfinity, extent) - top);
        sum += e;
        weighted += e * difference;
      });
      total += sum_of(sum);
      moment += sum_of(weighted);
    });
    const float b = load_one(base + a.target[row]);
    const float difference = load_one(thought + a.target[row]) - b;
    a.largest[row] = top;
    a.log_total[row] = logf((float)total);
    a.nll[row] = a.log_total[row] - (b + weight * difference - top);
    a.slope[row] = (float)(moment / total) - difference;
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
    const auto probability = [&](Vec b, Vec t) { return exp(b + weight * (t - b) - top - log_total); };
    const auto write = [&](int64_t v, Vec gradient, auto extent) {
      if (d_base) store(d_base + v, gradient * (1 - weight), extent);
      if (d_thought) store(d_thought + v, gradient * weight, extent);
    };
    for_vectors(0, a.vocabulary, [&](int64_t v, auto extent) {
      write(v, probability(load(base + v, extent), load(thought + v, extent)) * scale, extent);
    });
    const int64_t target = a.target[row];  // p − 1, formed before any rounding to a narrower dtype
    const Vec p = probability(splat(load_one(base + target)), splat(load_one(thought + target)));
    write(target, p * scale - scale, Part{1});
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
