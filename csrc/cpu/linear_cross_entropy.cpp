// The row kernel of the linear cross-entropies: nll of softmax(logits / temperature), and the gradient in their place.
//
// From memory a row is read once and written once. Its 128 KB (V = 32,002) then stay in the L2 cache, where two of the
// three passes find them: maximum, exponentials with their sum, scaling. Without a gradient nothing is written.

#include "kernel_table.h"
#include "parallel.h"

namespace quietstar::cpu::QUIETSTAR_ISA {

void cross_entropy_rows(const CrossEntropyRows& a) {
  const float inverse = 1 / a.temperature;
  for_rows(a.rows, useful_threads(a.rows, 2 * a.vocabulary, a.threads), [&](int64_t row, int) {
    float* logits = a.logits.row(row);
    for (int64_t i = 0; i < a.suppressed_count; ++i) logits[a.suppressed[i]] = -kInfinity;
    Vec highest = splat(kLowest);
    for_vectors(0, a.vocabulary, [&](int64_t v, auto extent) {
      highest = larger(inside_or(load(logits + v, extent), kLowest, extent), highest);
    });
    const float top = largest_of(highest);
    const int64_t target = a.target[row];
    const float at_target = (logits[target] - top) * inverse;

    double total = 0;
    for_blocks(a.vocabulary, [&](int64_t begin, int64_t end) {
      Vec sum{};
      for_vectors(begin, end, [&](int64_t v, auto extent) {
        const Vec e = exp((inside_or(load(logits + v, extent), -kInfinity, extent) - top) * inverse);
        sum += e;
        if (a.scale) store(logits + v, e, extent);
      });
      total += sum_of(sum);
    });
    const float sum = (float)total;
    a.nll[row] = logf(sum) - at_target;
    if (!a.scale) return;

    const float scale = a.scale[row] * inverse, factor = scale / sum;
    for_vectors(0, a.vocabulary,
                [&](int64_t v, auto extent) { store(logits + v, load(logits + v, extent) * factor, extent); });
    logits[target] -= scale;  // p − 1
  });
}

}  // namespace quietstar::cpu::QUIETSTAR_ISA
