// The base part of thought attention: the queries behind every anchor against the base keys that the anchor sees.
//
// As in FlashAttention (Dao et al., NeurIPS 2022), scores exist for one block of keys at a time. A task is a block of
// anchors and a key/value head: its rows are those of all heads of the group and of all steps, so that a key is loaded
// once for many rows. Scores are transposed, [keys, rows]: rows lie in the lanes of a vector, and keys and values are
// used as they lie in memory.
//
// What is not seen may be NaN, and 0 · NaN is NaN: a block of which no row sees some keys is copied, with zeros for
// those, and rows that see no key are taken for zeros.

#include "kernel_table.h"
#include "parallel.h"
#include "tile.h"

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

constexpr int64_t kKeys = 32;          // of a block
constexpr int64_t kRowsOfATask = 128;  // about; a task has at least one anchor

// The base keys or values of all heads in float32, with whole vectors in a row: as they are, or else a copy.
class BaseRows {
 public:
  template <class T>
  BaseRows(const BaseShape& shape, const Steps<const T>& from)
      : kv_heads_(shape.kv_heads),
        width_(rounded_up(shape.head_size, kLanes)),
        copy_(usable(shape, from) ? 0 : shape.batch * shape.kv_heads * shape.length * width_, 1) {
    if (usable(shape, from)) {
      given_ = {(const float*)from.data, from.batch_stride, from.head_stride, 0, from.step_stride};
      return;
    }
    given_ = {copy_.of_thread(0), shape.kv_heads * shape.length * width_, shape.length * width_, 0, width_};
    for_rows(shape.batch * shape.kv_heads * shape.length, shape.threads, [&](int64_t row, int) {
      const int64_t head = row / shape.length;
      const T* first = from.at(head / shape.kv_heads, head % shape.kv_heads, 0);
      gather(first + row % shape.length * from.step_stride, copy_.of_thread(0) + row * width_, shape.head_size);
    });
  }

  const float* row(int64_t head, int64_t key) const {
    return given_.at(head / kv_heads_, head % kv_heads_, 0) + key * stride();
  }

  int64_t stride() const { return given_.step_stride; }

 private:
  static bool usable(const BaseShape& shape, const Steps<const float>&) { return shape.head_size % kLanes == 0; }
  static bool usable(const BaseShape&, const Steps<const BFloat16>&) { return false; }

  int64_t kv_heads_, width_;
  Scratch copy_;
  Steps<const float> given_;
};

// The sizes of tasks. Row (a·G + g)·S + s of a task is step s of head g of the group behind the task's anchor a.
struct Tasks {
  const BaseShape& shape;
  const int64_t group = shape.query_heads / shape.kv_heads;
  const int64_t rows_of_an_anchor = group * shape.steps;
  const int64_t wanted = kRowsOfATask > rows_of_an_anchor ? kRowsOfATask / rows_of_an_anchor : 1;
  const int64_t most_anchors = smaller(wanted, shape.anchors);
  const int64_t most_rows = rounded_up(most_anchors * rows_of_an_anchor, kLanes);
  const int64_t blocks = (shape.anchors + most_anchors - 1) / most_anchors;  // of anchors
  const int64_t heads = shape.batch * shape.kv_heads;
  const int64_t width = rounded_up(shape.head_size, kLanes);
};

// The keys that a row sees.
struct Range {
  int64_t first, last;

  bool empty() const { return first >= last; }
};

// Which keys of a block some row sees: a bit for each.
using Seen = uint32_t;
static_assert(kKeys <= 32, "a block's keys are the bits of Seen");

// The rows of one task, and where they lie in the tensors.
class Task {
 public:
  Task(const Tasks& tasks, int64_t head, int64_t block)
      : tasks_(tasks),
        batch_(head / tasks.shape.kv_heads),
        kv_head_(head % tasks.shape.kv_heads),
        anchor_(block * tasks.most_anchors),
        anchors_(smaller(tasks.most_anchors, tasks.shape.anchors - anchor_)),
        rows_(anchors_ * tasks.rows_of_an_anchor) {}

  int64_t rows() const { return rows_; }

  Range keys_of(int64_t row) const { return keys_of_anchor(row / tasks_.rows_of_an_anchor); }

  Range keys_of_anchor(int64_t anchor) const {
    const int64_t place = batch_ * tasks_.shape.anchors + anchor_ + anchor;
    return {tasks_.shape.first[place], tasks_.shape.last[place]};
  }

  // The keys that any row sees, and maybe some in front of them: whole blocks.
  Range keys() const {
    Range all{tasks_.shape.length, 0};
    for (int64_t anchor = 0; anchor < anchors_; ++anchor) {
      const Range keys = keys_of_anchor(anchor);
      if (keys.empty()) continue;
      all = {smaller(all.first, keys.first / kKeys * kKeys), all.last > keys.last ? all.last : keys.last};
    }
    return all;
  }

  Seen seen(int64_t block) const {
    Seen seen = 0;
    for (int64_t anchor = 0; anchor < anchors_; ++anchor) {
      const Range keys = keys_of_anchor(anchor);
      const int64_t first = keys.first > block ? keys.first - block : 0, last = smaller(keys.last - block, kKeys);
      if (first < last) seen |= ~Seen{0} >> (32 - (last - first)) << first;
    }
    return seen;
  }

  template <class T>
  T* row_of(const Steps<T>& tensor, int64_t row) const {
    const int64_t anchor = row / tasks_.rows_of_an_anchor, in_anchor = row % tasks_.rows_of_an_anchor;
    const int64_t head = in_anchor / tasks_.shape.steps, step = in_anchor % tasks_.shape.steps;
    return tensor.at(batch_, kv_head_ * tasks_.group + head, anchor_ + anchor) + step * tensor.step_stride;
  }

  // As rows [most_rows, width].
  template <class T>
  void gather_rows(const Steps<const T>& from, float* to) const {
    for (int64_t row = 0; row < rows_; ++row, to += tasks_.width) {
      if (keys_of(row).empty()) {
        memset(to, 0, tasks_.width * sizeof(float));
      } else {
        gather(row_of(from, row), to, tasks_.shape.head_size);
      }
    }
  }

  // As columns [D, most_rows], with zeros behind the last.
  template <class T>
  void gather_columns(const Steps<const T>& from, float* to) const {
    memset(to, 0, tasks_.shape.head_size * tasks_.most_rows * sizeof(float));
    for (int64_t row = 0; row < rows_; ++row) {
      if (keys_of(row).empty()) continue;
      const T* place = row_of(from, row);
      for (int64_t d = 0; d < tasks_.shape.head_size; ++d) to[d * tasks_.most_rows + row] = load_one(place + d);
    }
  }

  // The inverse of gather_rows.
  void scatter_rows(const float* from, const Steps<float>& to) const {
    for (int64_t row = 0; row < rows_; ++row) {
      float* place = row_of(to, row);
      for_vectors(0, tasks_.shape.head_size, [&](int64_t d, auto extent) {
        store(place + d, load(from + row * tasks_.width + d, Whole{}), extent);
      });
    }
  }

 private:
  const Tasks& tasks_;
  int64_t batch_, kv_head_, anchor_, anchors_, rows_;
};

// The ranges of keys of the rows of a task, for vectors of rows. Those behind the last row are empty.
struct Ranges {
  int32_t *first, *last;

  Ranges(const Task& task, int64_t most_rows, float* memory)
      : first(reinterpret_cast<int32_t*>(memory)), last(first + most_rows) {
    for (int64_t row = 0; row < most_rows; ++row) {
      const Range keys = row < task.rows() ? task.keys_of(row) : Range{0, 0};
      first[row] = (int32_t)keys.first, last[row] = (int32_t)keys.last;
    }
  }

  static constexpr int kFloats = 2;  // of memory for a row
};

// The keys or values of a block: as they lie, or if some are not seen a copy in memory for kKeys rows of `width`
// floats.
struct BlockRows {
  const float* data;
  int64_t stride;

  BlockRows(const BaseRows& from, int64_t head, int64_t block, int64_t inside, Seen seen, int64_t width, float* memory)
      : data(from.row(head, block)), stride(from.stride()) {
    if (seen == ~Seen{0} >> (32 - inside)) return;
    for (int64_t key = 0; key < inside; ++key) {
      if (seen >> key & 1) {
        memcpy(memory + key * width, data + key * stride, width * sizeof(float));
      } else {
        memset(memory + key * width, 0, width * sizeof(float));
      }
    }
    data = memory, stride = width;
  }
};

inline IntVec load(const int32_t* from) {
  IntVec v;
  memcpy(&v, from, sizeof v);
  return v;
}

}  // namespace

template <class T>
void base_forward(const BaseForward<T>& a) {
  const Tasks tasks{a};
  const BaseRows keys(a, a.key), values(a, a.value);
  const int64_t width = tasks.width, most = tasks.most_rows;
  const Scratch scratch(most * (a.head_size + width + kKeys + 3 + Ranges::kFloats) + kKeys * width, a.threads);
  for_rows(tasks.heads * tasks.blocks, a.threads, [&](int64_t number, int thread) {
    const int64_t head = number / tasks.blocks;
    const Task task(tasks, head, number % tasks.blocks);
    const int64_t rows = task.rows(), wide = rounded_up(rows, kLanes);
    float* queries = scratch.of_thread(thread);  // columns
    float* outputs = queries + most * a.head_size;
    float* scores = outputs + most * width;  // then exponentials
    float* tops = scores + most * kKeys;
    float* sums = tops + most;
    float* shrinks = sums + most;
    const Ranges ranges(task, most, shrinks + most);
    float* seen_values = shrinks + most * (1 + Ranges::kFloats);
    task.gather_columns(a.query, queries);
    memset(outputs, 0, rows * width * sizeof(float));
    for (int64_t row = 0; row < wide; ++row) tops[row] = kLowest, sums[row] = 0;

    const Range all = task.keys();
    for (int64_t block = all.first; block < all.last; block += kKeys) {
      const int64_t inside = smaller(kKeys, a.length - block);
      multiply({keys.row(head, block), keys.stride(), 1}, queries, most, inside, wide, a.head_size, {scores, most});
      for (int64_t row = 0; row < wide; row += kLanes) {
        const IntVec first = load(ranges.first + row), last = load(ranges.last + row);
        const Vec top = load(tops + row, Whole{});
        Vec highest = top, total{};
        for (int64_t key = 0; key < inside; ++key) {
          const int32_t number = (int32_t)(block + key);
          float* score = scores + key * most + row;
          const Vec s = (first <= number) & (number < last) ? load(score, Whole{}) * a.scale : splat(-kInfinity);
          store(score, s, Whole{});
          highest = larger(s, highest);
        }
        for (int64_t key = 0; key < inside; ++key) {
          const Vec e = exp(load(scores + key * most + row, Whole{}) - highest);
          store(scores + key * most + row, e, Whole{});
          total += e;
        }
        const Vec shrink = exp(top - highest);
        store(tops + row, highest, Whole{});
        store(sums + row, load(sums + row, Whole{}) * shrink + total, Whole{});
        store(shrinks + row, shrink, Whole{});
      }
      for (int64_t row = 0; row < rows; ++row) {
        float* output = outputs + row * width;
        if (shrinks[row] == 1) continue;
        for (int64_t d = 0; d < width; d += kLanes)
          store(output + d, load(output + d, Whole{}) * shrinks[row], Whole{});
      }
      const BlockRows value_rows(values, head, block, inside, task.seen(block), width, seen_values);
      multiply({scores, 1, most}, value_rows.data, value_rows.stride, rows, width, inside, {outputs, width}, true);
    }

    for (int64_t row = 0; row < rows; ++row) {
      float* output = outputs + row * width;
      const float factor = sums[row] != 0 ? 1 / sums[row] : 0;
      for (int64_t d = 0; d < width; d += kLanes) store(output + d, load(output + d, Whole{}) * factor, Whole{});
      *task.row_of(a.lse, row) = sums[row] != 0 ? tops[row] + logf(sums[row]) : -kInfinity;
    }
    task.scatter_rows(outputs, a.output);
  });
}

template <class T>
void base_backward(const BaseBackward<T>& a) {
  const Tasks tasks{a};
  const BaseRows keys(a, a.key), values(a, a.value);
  const int64_t width = tasks.width, most = tasks.most_rows;
  // The gradients of keys and values are sums over tasks. Few long chains of tasks, two for every thread, add up their
  // own; a chain takes every so many-th block of anchors, because later ones see more keys.
  const int64_t wanted = (2 * a.threads + tasks.heads - 1) / tasks.heads, chains = smaller(wanted, tasks.blocks);
  const int64_t floats = a.length * width;
  const Scratch sums(2 * floats * tasks.heads * chains, 1);
  const auto sum_of_chain = [&](int64_t head, int64_t chain, int which) {
    return sums.of_thread(0) + (2 * (head * chains + chain) + which) * floats;
  };
  const Scratch scratch(most * (2 * a.head_size + 3 * width + 2 * kKeys + 2 + Ranges::kFloats) + 2 * kKeys * width,
                        a.threads);
  for_rows(tasks.heads * chains, a.threads, [&](int64_t number, int thread) {
    const int64_t head = number / chains, chain = number % chains;
    float *grad_keys = sum_of_chain(head, chain, 0), *grad_values = sum_of_chain(head, chain, 1);
    memset(grad_keys, 0, 2 * floats * sizeof(float));
    float* query_columns = scratch.of_thread(thread);
    float* grad_columns = query_columns + most * a.head_size;
    float* queries = grad_columns + most * a.head_size;
    float* grads = queries + most * width;
    float* grad_queries = grads + most * width;
    float* probabilities = grad_queries + most * width;
    float* grad_scores = probabilities + most * kKeys;
    float* lses = grad_scores + most * kKeys;
    float* deltas = lses + most;
    float* seen_keys = deltas + most * (1 + Ranges::kFloats);
    float* seen_values = seen_keys + kKeys * width;
    for (int64_t anchors = chain; anchors < tasks.blocks; anchors += chains) {
      const Task task(tasks, head, anchors);
      const int64_t rows = task.rows(), wide = rounded_up(rows, kLanes);
      const Ranges ranges(task, most, deltas + most);
      task.gather_columns(a.query, query_columns);
      task.gather_columns(a.grad_output, grad_columns);
      task.gather_rows(a.query, queries);
      task.gather_rows(a.grad_output, grads);
      memset(grad_queries, 0, rows * width * sizeof(float));
      for (int64_t row = 0; row < wide; ++row) {
        lses[row] = kInfinity, deltas[row] = 0;  // exp(score − lse) is then 0
        if (row >= rows || *task.row_of(a.lse, row) == -kInfinity) continue;
        const T* output = task.row_of(a.output, row);
        Vec products{};
        for_vectors(0, a.head_size, [&](int64_t d, auto extent) {
          products += load(grads + row * width + d, Whole{}) * load(output + d, extent);
        });
        lses[row] = *task.row_of(a.lse, row);
        deltas[row] = sum_of(products) - (a.grad_lse.data ? *task.row_of(a.grad_lse, row) : 0);
      }

      const Range all = task.keys();
      for (int64_t block = all.first; block < all.last; block += kKeys) {
        const int64_t inside = smaller(kKeys, a.length - block);
        const Seen seen = task.seen(block);
        const BlockRows key_rows(keys, head, block, inside, seen, width, seen_keys);
        const BlockRows value_rows(values, head, block, inside, seen, width, seen_values);
        multiply({key_rows.data, key_rows.stride, 1}, query_columns, most, inside, wide, a.head_size,
                 {probabilities, most});
        multiply({value_rows.data, value_rows.stride, 1}, grad_columns, most, inside, wide, a.head_size,
                 {grad_scores, most});
        for (int64_t row = 0; row < wide; row += kLanes) {
          const IntVec first = load(ranges.first + row), last = load(ranges.last + row);
          const Vec lse = load(lses + row, Whole{}), delta = load(deltas + row, Whole{});
          for (int64_t key = 0; key < inside; ++key) {
            const int32_t number = (int32_t)(block + key);
            float *probability = probabilities + key * most + row, *grad_score = grad_scores + key * most + row;
            const Vec s = load(probability, Whole{}) * a.scale - lse;
            const Vec p = exp((first <= number) & (number < last) ? s : splat(-kInfinity));
            store(probability, p, Whole{});
            store(grad_score, p * (load(grad_score, Whole{}) - delta) * a.scale, Whole{});
          }
        }
        multiply({grad_scores, most, 1}, queries, width, inside, width, rows, {grad_keys + block * width, width}, true);
        multiply({probabilities, most, 1}, grads, width, inside, width, rows, {grad_values + block * width, width},
                 true);
        multiply({grad_scores, 1, most}, key_rows.data, key_rows.stride, rows, width, inside, {grad_queries, width},
                 true);
      }
      task.scatter_rows(grad_queries, a.grad_query);
    }
  });

  for_rows(tasks.heads * a.length, a.threads, [&](int64_t number, int) {
    const int64_t head = number / a.length, key = number % a.length;
    for (int which = 0; which < 2; ++which) {
      const Steps<float>& to = which ? a.grad_value : a.grad_key;
      float* row = to.at(head / a.kv_heads, head % a.kv_heads, 0) + key * to.step_stride;
      for_vectors(0, a.head_size, [&](int64_t d, auto extent) {
        Vec sum{};
        for (int64_t chain = 0; chain < chains; ++chain) {
          sum += load(sum_of_chain(head, chain, which) + key * width + d, Whole{});
        }
        store(row + d, sum, extent);
      });
    }
  });
}

template void base_forward(const BaseForward<float>&);
template void base_forward(const BaseForward<BFloat16>&);
template void base_backward(const BaseBackward<float>&);
template void base_backward(const BaseBackward<BFloat16>&);

}  // namespace quietstar::cpu::QUIETSTAR_ISA
