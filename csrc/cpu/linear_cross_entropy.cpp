// The linear cross-entropies: nll and entropy of softmax(hidden · weightᵀ / temperature), and the gradients of
// sum(scale · nll) − sum(entropy_scale · entropy).
//
// Twice over the vocabulary, in blocks of tokens shared among threads. First the logits of a block are made, tile by
// tile, and turned in the L1 cache into exponentials over the largest of their row and block; with those sums the nll
// is known. Then, with a gradient, the exponentials come back from memory once, are scaled to d logits in the L2 cache,
// and go into both products with them: d hidden += d logits · weight and d weight = d logitsᵀ · hidden.
//
// The gradient of an entropy, or through a cap, needs the logits again. They are then kept in place of the
// exponentials, which are made a second time.

#include "kernel_table.h"
#include "matmul.h"

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

// Blocks of this many tokens meet as many rows at a time, both in whole tiles: d logits, and at usual sizes a block's
// part of the weight or its gradient, then stay in the L2 cache.
constexpr int64_t kSide = 192;
static_assert(kSide % kTileRows == 0 && kSide % kTileColumns == 0);
static_assert(12 % kTileRows == 0 && 64 % kTileColumns == 0, "the room in kernels.h is for whole tiles");

// Differences of logits are no less where they are multiplied with their exponentials: −∞ times 0 would be NaN.
constexpr float kFarBelow = -1e4f;

struct Block {
  int64_t number, first, tokens;
};

template <class T>
class Chunk {
 public:
  explicit Chunk(const LinearCrossEntropy<T>& arguments)
      : a(arguments),
        blocks_(rounded_up(a.vocabulary, kSide) / kSide),
        width_(rounded_up(a.size, kTileColumns)),
        padded_rows_(rounded_up(a.rows, kTileRows)),
        largest_(blocks_ * a.rows, 1),
        total_(blocks_ * a.rows, 1),
        moment_(a.entropy ? blocks_ * a.rows : 0, 1),
        known_(a.rows * (int64_t)(sizeof(Known) / sizeof(float)), 1),
        at_target_(a.rows, 1) {}

  void run() {
    make_exponentials();
    for_rows(a.rows, useful_threads(a.rows, blocks_, a.threads), [&](int64_t row, int) { reduce(row); });
    if (a.scale) make_gradients();
  }

 private:
  Block block(int64_t number) const {
    const int64_t first = number * kSide;
    return {number, first, smaller(kSide, a.vocabulary - first)};
  }

  // What the gradient of a row is made of, where logits are kept.
  struct Known {
    float largest, inverse_total, mean;  // the mean of (z − largest) / temperature
  };

  bool keeps_logits() const { return a.softcap || a.entropy_scale; }

  // Where the exponentials or the logits of a block are kept, from a row on: in whole tiles.
  Rows kept(const Block& block, int64_t row) const {
    const int64_t stride = rounded_up(block.tokens, kTileColumns);
    return {a.room + block.first * padded_rows_ + row * stride, stride};
  }

  // Indexed by row and block.
  float& largest(int64_t row, int64_t block) const { return largest_.of_thread(0)[row * blocks_ + block]; }
  float& total(int64_t row, int64_t block) const { return total_.of_thread(0)[row * blocks_ + block]; }
  float& moment(int64_t row, int64_t block) const { return moment_.of_thread(0)[row * blocks_ + block]; }
  Known& known(int64_t row) const { return reinterpret_cast<Known*>(known_.of_thread(0))[row]; }
  float& at_target(int64_t row) const { return at_target_.of_thread(0)[row]; }

  void make_exponentials() {
    const Scratch left(LeftPanels::size(a.rows, a.size), 1), right(kSide * a.size, a.threads);
    const Scratch unkept(kSide * kSide, a.threads);
    LeftPanels hidden(left.of_thread(0), a.size);
    hidden.pack(a.hidden, 0, a.rows, a.threads);
    for_rows(blocks_, a.threads, [&](int64_t number, int thread) {
      const Block tokens = block(number);
      RightPanels weight(right.of_thread(thread), a.size);
      weight.pack(a.weight, tokens.first, tokens.tokens, 1);
      for (int64_t row = 0; row < a.rows; row += kSide) {
        const int64_t rows = smaller(kSide, a.rows - row);
        const Rows to = a.scale ? kept(tokens, row) : Rows{unkept.of_thread(thread), kSide};
        multiply(hidden, row, rows, weight, 0, tokens.tokens, to.data, to.stride);
        for (int64_t i = 0; i < rows; ++i) {
          float* logits = to.data + i * to.stride;
          prepare(tokens, row + i, logits);
          if (a.entropy || keeps_logits()) {
            sum_up<true>(tokens, row + i, logits);
          } else {
            sum_up<false>(tokens, row + i, logits);
          }
        }
      }
    });
  }

  void prepare(const Block& block, int64_t row, float* logits) {
    if (a.softcap) cap_logits(logits, block.tokens, a.softcap);
    for (int64_t i = 0; i < a.suppressed_count; ++i) {
      const int64_t place = a.suppressed[i] - block.first;
      if (place >= 0 && place < block.tokens) logits[place] = -kInfinity;
    }
    const int64_t target = a.target[row] - block.first;
    if (target >= 0 && target < block.tokens) at_target(row) = logits[target];
  }

  // Σ e^z and, with a moment, Σ z e^z over the differences z to the largest logit; without, leaves e^z in the room.
  template <bool kMoment>
  void sum_up(const Block& block, int64_t row, float* logits) {
    const float inverse = 1 / a.temperature;
    const bool keeps_exponentials = a.scale && !(kMoment && keeps_logits());
    Vec highest = splat(kLowest), sum{}, weighted{};
    for_vectors(0, block.tokens, [&](int64_t v, auto extent) {
      highest = larger(inside_or(load(logits + v, extent), kLowest, extent), highest);
    });
    const float top = largest_of(highest);
    for_vectors(0, block.tokens, [&](int64_t v, auto extent) {
      const Vec z = (inside_or(load(logits + v, extent), -kInfinity, extent) - top) * inverse, e = exp(z);
      sum += e;
      if constexpr (kMoment) weighted += e * larger(z, splat(kFarBelow));
      if (keeps_exponentials) store(logits + v, e, extent);
    });
    largest(row, block.number) = top;
    total(row, block.number) = sum_of(sum);
    if (a.entropy) moment(row, block.number) = sum_of(weighted);
  }

  // The nll and entropy, and in the place of the totals what makes d logits of the exponentials.
  void reduce(int64_t row) {
    const float inverse = 1 / a.temperature;
    float top = kLowest;
    for (int64_t i = 0; i < blocks_; ++i) top = largest(row, i) > top ? largest(row, i) : top;
    double sum = 0;
    for (int64_t i = 0; i < blocks_; ++i) sum += (double)total(row, i) * exp((largest(row, i) - top) * inverse);
    a.nll[row] = logf((float)sum) - (at_target(row) - top) * inverse;
    double mean = 0;
    for (int64_t i = 0; a.entropy && i < blocks_; ++i) {
      const float down = (largest(row, i) - top) * inverse;
      mean += exp(down) * (moment(row, i) + (double)(down > kFarBelow ? down : kFarBelow) * total(row, i)) / sum;
    }
    if (a.entropy) a.entropy[row] = logf((float)sum) - (float)mean;
    known(row) = {top, 1 / (float)sum, (float)mean};
    if (!a.scale || keeps_logits()) return;
    const float factor = a.scale[row] * inverse / (float)sum;
    for (int64_t i = 0; i < blocks_; ++i) total(row, i) = factor * exp((largest(row, i) - top) * inverse);
  }

  void make_gradients() {
    const int64_t segments = smaller(2 * a.threads, blocks_);
    const Scratch hidden(a.rows * width_, 1), d_logits(kSide * kSide, a.threads), weight(kSide * width_, a.threads),
        d_weight(kSide * width_, a.threads), d_hidden(a.d_hidden ? padded_rows_ * width_ : 0, (int)segments);
    const int64_t parts = rounded_up(a.rows, kSide) / kSide;
    for_rows(parts, a.threads, [&](int64_t part, int) {
      const int64_t row = part * kSide, rows = smaller(kSide, a.rows - row);
      pack_columns(a.hidden, row, rows, a.size, hidden.of_thread(0) + row * width_);
    });
    // Every segment of the vocabulary has its own sum for d hidden: which thread took it makes no difference.
    for_rows(segments, a.threads, [&](int64_t segment, int thread) {
      const int64_t begin = segment * blocks_ / segments, end = (segment + 1) * blocks_ / segments;
      float* p = d_logits.of_thread(thread);
      for (int64_t number = begin; number < end; ++number) {
        const Block tokens = block(number);
        if (a.d_hidden) pack_columns(a.weight, tokens.first, tokens.tokens, a.size, weight.of_thread(thread));
        for (int64_t row = 0; row < a.rows; row += kSide) {
          const int64_t rows = smaller(kSide, a.rows - row);
          for (int64_t i = 0; i < rows; ++i) {
            if (keeps_logits()) {
              differentiate(tokens, row + i, p + i * kSide);
            } else {
              scale_exponentials(tokens, row + i, p + i * kSide);
            }
          }
          if (a.d_hidden) {
            multiply_columns({p, kSide, 1}, rows, weight.of_thread(thread), tokens.tokens,
                             {d_hidden.of_thread((int)segment) + row * width_, width_}, number > begin);
          }
          if (a.d_weight) {
            multiply_columns({p, 1, kSide}, tokens.tokens, hidden.of_thread(0) + row * width_, rows,
                             {d_weight.of_thread(thread), width_}, row > 0);
          }
        }
        for (int64_t i = 0; a.d_weight && i < tokens.tokens; ++i) {
          put(d_weight.of_thread(thread) + i * width_, a.d_weight + (tokens.first + i) * a.size, a.add);
        }
      }
    });
    for_rows(a.d_hidden ? a.rows : 0, useful_threads(a.rows, segments * a.size, a.threads), [&](int64_t row, int) {
      for (int segment = 0; segment < segments; ++segment) {
        put(d_hidden.of_thread(segment) + row * width_, a.d_hidden + row * a.size, segment > 0);
      }
    });
  }

  void scale_exponentials(const Block& block, int64_t row, float* d_logits) {
    const float* from = kept(block, row).data;
    const float factor = total(row, block.number);
    for_vectors(0, block.tokens,
                [&](int64_t v, auto extent) { store(d_logits + v, load(from + v, extent) * factor, extent); });
    const int64_t target = a.target[row] - block.first;
    if (target >= 0 && target < block.tokens) d_logits[target] -= a.scale[row] / a.temperature;
  }

  void differentiate(const Block& block, int64_t row, float* d_logits) {
    const float* from = kept(block, row).data;
    const Known of_row = known(row);
    const float inverse = 1 / a.temperature, scale = a.scale[row];
    const float entropy_scale = a.entropy_scale ? a.entropy_scale[row] : 0;
    const auto slope = [&](Vec logit) {
      const Vec part = logit / a.softcap;
      return a.softcap ? 1.0f - part * part : splat(1);
    };
    for_vectors(0, block.tokens, [&](int64_t v, auto extent) {
      const Vec logit = load(from + v, extent), z = (logit - of_row.largest) * inverse;
      const Vec probability = exp(z) * of_row.inverse_total;
      const Vec weight = scale + entropy_scale * (larger(z, splat(kFarBelow)) - of_row.mean);
      const Vec gradient = probability * weight * inverse * slope(logit);
      store(d_logits + v, probability == 0.0f ? Vec{} : gradient, extent);
    });
    const int64_t target = a.target[row] - block.first;
    if (target < 0 || target >= block.tokens) return;
    d_logits[target] -= scale * inverse * slope(splat(at_target(row)))[0];
  }

  void put(const float* from, float* to, bool add) {
    for_vectors(0, a.size, [&](int64_t i, auto extent) {
      const Vec v = load(from + i, extent);
      store(to + i, add ? load(to + i, extent) + v : v, extent);
    });
  }

  const LinearCrossEntropy<T>& a;
  const int64_t blocks_, width_, padded_rows_;
  const Scratch largest_, total_, moment_, known_, at_target_;
};

}  // namespace

template <class T>
void linear_cross_entropy(const LinearCrossEntropy<T>& a) {
  Chunk<T>(a).run();
}

template void linear_cross_entropy(const LinearCrossEntropy<float>&);
template void linear_cross_entropy(const LinearCrossEntropy<BFloat16>&);

}  // namespace quietstar::cpu::QUIETSTAR_ISA
