// The diagonal part of thought attention: the queries behind one anchor against that anchor's own thought keys, merged
// with what the base keys gave.
//
// One task is an anchor and a key/value head: m = G·S rows (all heads of the group, all steps that exist), T keys
// (those that any of them sees), D elements, values of Dv. Its rows are gathered in float32 and padded with zeros to
// whole vectors, so that everything is a product of small matrices that stay in the cache: 2 of them forward, 5
// backward, 2 m T D FLOP each. What single rows do not see is computed too and masked: at T = 12 skipping it would save
// little. From memory each tensor is read or written once.

#include "kernel_table.h"
#include "parallel.h"
#include "thought_mask.h"

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

int64_t padded(int64_t size) { return rounded_up(size, kLanes); }

// An anchor of one text, and a key/value head.
struct Place {
  int64_t batch, kv_head, anchor;
};

// The sizes of a task.
struct Sizes {
  const int64_t group, queries, thought_keys, head_size, value_size;
  const int64_t rows = group * queries;              // m
  const int64_t keys = padded(thought_keys);         // T in whole vectors
  const int64_t width = padded(head_size);           // D in whole vectors
  const int64_t value_width = padded(value_size);    // Dv in whole vectors
  const int64_t query_floats = rows * width;         // [m, width]
  const int64_t output_floats = rows * value_width;  // [m, value_width]
  const int64_t score_floats = rows * keys;          // [m, keys]
  const int64_t key_floats = thought_keys * width;   // [T, width]
  const int64_t value_floats = thought_keys * value_width;
  const int64_t key_columns = head_size * keys;  // [D, keys]
  const int64_t value_columns = value_size * keys;

  Sizes(const ThoughtShape& shape, int64_t queries, int64_t thought_keys)
      : group(shape.query_heads / shape.kv_heads),
        queries(queries),
        thought_keys(thought_keys),
        head_size(shape.head_size),
        value_size(shape.value_size) {}

  // Those of the largest tasks.
  explicit Sizes(const ThoughtShape& shape) : Sizes(shape, shape.steps, shape.thought_steps) {}
};

// And where its rows and keys are found. Row g·queries + s is query s of head g of the group.
class Task : public Sizes {
 public:
  Task(const ThoughtShape& shape, Place place) : Task(shape, place, Sight(shape, place.batch, place.anchor)) {}

  // The thought keys that a row sees, numbered as in the task.
  Range keys_of(int64_t row) const {
    const Range keys = sight_.thought_keys(row % queries);
    return {keys.first - first_key_, keys.last - first_key_};
  }

  template <class T>
  T* row_of(const Steps<T>& tensor, int64_t row) const {
    return row_of(tensor, row / queries, row % queries);
  }

  template <class T>
  void gather_rows(const Steps<const T>& from, int64_t size, float* to) const {
    for (int64_t row = 0; row < rows; ++row) gather(row_of(from, row), to + row * padded(size), size);
  }

  // The thought keys or values as they are, [T, size in whole vectors].
  template <class T>
  void gather_keys(const Steps<const T>& from, int64_t size, float* to) const {
    const T* first = key_of(from, 0);
    for (int64_t t = 0; t < thought_keys; ++t) gather(first + t * from.step_stride, to + t * padded(size), size);
  }

  // The thought keys or values as columns, [size, keys].
  template <class T>
  void transpose_keys(const Steps<const T>& from, int64_t size, float* to) const {
    const T* first = key_of(from, 0);
    memset(to, 0, size * keys * sizeof(float));
    for (int64_t t = 0; t < thought_keys; ++t) {
      for (int64_t d = 0; d < size; ++d) to[d * keys + t] = load_one(first + t * from.step_stride + d);
    }
  }

  template <class T>
  T* key_of(const Steps<T>& tensor, int64_t key) const {
    return tensor.at(place_.batch, place_.kv_head, place_.anchor) + (first_key_ + key) * tensor.step_stride;
  }

  // Calls body(row of the tensor) for the queries that do not exist.
  template <class T, class Body>
  void for_missing_rows(const Steps<T>& tensor, Body body) const {
    for (int64_t head = 0; head < group; ++head) {
      for (int64_t query = queries; query < all_queries_; ++query) body(row_of(tensor, head, query));
    }
  }

  // Those of gradients of thought keys or values that no row sees.
  template <class T>
  void clear_missing_keys(const Steps<T>& tensor, int64_t size) const {
    for (int64_t key = -first_key_; key < all_keys_ - first_key_; ++key) {
      if (key < 0 || key >= thought_keys) memset(key_of(tensor, key), 0, size * sizeof(T));
    }
  }

 private:
  Task(const ThoughtShape& shape, Place place, const Sight& sight)
      : Sizes(shape, sight.queries(), sight.queries() ? sight.thought_keys().last - sight.thought_keys().first : 0),
        sight_(sight),
        place_(place),
        first_key_(sight.thought_keys().first),
        all_queries_(shape.steps),
        all_keys_(shape.thought_steps) {}

  template <class T>
  T* row_of(const Steps<T>& tensor, int64_t head, int64_t query) const {
    return tensor.at(place_.batch, place_.kv_head * group + head, place_.anchor) + query * tensor.step_stride;
  }

  const Sight sight_;
  const Place place_;
  const int64_t first_key_, all_queries_, all_keys_;
};

// Which of the columns of a vector lie in a range.
inline IntVec inside(Range range, int64_t column) {
  const IntVec numbers = lane_numbers() + (int32_t)column;
  return (numbers >= (int32_t)range.first) & (numbers < (int32_t)range.last);
}

// Calls body(task, thread) for all tasks.
template <class Body>
void for_tasks(const ThoughtShape& shape, Body body) {
  const int64_t tasks = shape.batch * shape.kv_heads * shape.anchors;
  const int64_t work =
      shape.query_heads / shape.kv_heads * shape.steps * shape.thought_steps * (shape.head_size + shape.value_size) / 8;
  for_rows(tasks, useful_threads(tasks, work, shape.threads), [&](int64_t number, int thread) {
    const int64_t head = number / shape.anchors;
    body(Task(shape, {head / shape.kv_heads, head % shape.kv_heads, number % shape.anchors}), thread);
  });
}

}  // namespace

template <class T>
void thought_forward(const ThoughtAttention<T>& a) {
  const Sizes most(a);
  const bool capped = a.mask.softcap != 0;
  const Scratch scratch(
      most.key_columns + most.value_floats + most.query_floats + most.output_floats + most.score_floats, a.threads);
  for_tasks(a, [&](const Task& task, int thread) {
    task.for_missing_rows(a.output, [&](T* row) { memset(row, 0, a.value_size * sizeof(T)); });
    task.for_missing_rows(a.lse, [](float* lse) { *lse = -kInfinity; });
    if (task.rows == 0) return;
    float* keys = scratch.of_thread(thread);  // transposed
    float* values = keys + task.key_columns;
    float* queries = values + task.value_floats;
    float* outputs = queries + task.query_floats;
    float* scores = outputs + task.output_floats;   // then probabilities
    const float scale = capped ? 1 : a.mask.scale;  // a capped score has been scaled
    task.gather_rows(a.query, a.head_size, queries);
    task.transpose_keys(a.thought_key, a.head_size, keys);
    task.gather_keys(a.thought_value, a.value_size, values);
    multiply({queries, task.width, 1}, keys, task.keys, task.rows, task.keys, a.head_size, {scores, task.keys});
    if (capped) cap({scores, task.keys}, task.rows, task.keys, a.mask);

    float* base_shares = queries;  // one per row; the queries have been used
    for (int64_t row = 0; row < task.rows; ++row) {
      float* score = scores + row * task.keys;
      const Range visible = task.keys_of(row);
      float* const lse = task.row_of(a.lse, row);
      const float base_lse = *lse;
      Vec highest = splat(base_lse);
      for_vectors(0, visible.last, [&](int64_t t, auto) {
        const Vec s = inside(visible, t) ? load(score + t, Whole{}) * scale : splat(-kInfinity);
        store(score + t, s, Whole{});
        highest = larger(s, highest);
      });
      const float top = largest_of(highest);
      Vec total{};
      for_vectors(0, visible.last, [&](int64_t t, auto) {
        const Vec e = exp(load(score + t, Whole{}) - top);
        store(score + t, e, Whole{});
        total += e;
      });
      const float base = exp(base_lse - top), sum = sum_of(total) + base;
      for_vectors(0, visible.last,
                  [&](int64_t t, auto) { store(score + t, load(score + t, Whole{}) * (1 / sum), Whole{}); });
      for (int64_t t = padded(visible.last); t < task.keys; t += kLanes) store(score + t, Vec{}, Whole{});
      *lse = top + logf(sum);
      base_shares[row] = base / sum;
    }

    multiply({scores, task.keys, 1}, values, task.value_width, task.rows, task.value_width, task.thought_keys,
             {outputs, task.value_width});
    for (int64_t row = 0; row < task.rows; ++row) {
      const float *own = outputs + row * task.value_width, *base = task.row_of(a.base_output, row);
      T* output = task.row_of(a.output, row);
      for_vectors(0, a.value_size, [&](int64_t d, auto extent) {
        store(output + d, load(own + d, Whole{}) + base_shares[row] * load(base + d, extent), extent);
      });
    }
  });
}

template <class T>
void thought_backward(const ThoughtAttentionBackward<T>& a) {
  const Sizes most(a);
  const bool capped = a.mask.softcap != 0;
  const int64_t largest_keys = greater(most.key_floats, most.value_floats);
  const Scratch scratch(most.key_columns + most.value_columns + most.key_floats + largest_keys + 2 * most.query_floats +
                            2 * most.output_floats + (capped ? 3 : 2) * most.score_floats,
                        a.threads);
  for_tasks(a, [&](const Task& task, int thread) {
    task.for_missing_rows(a.grad_query, [&](T* row) { memset(row, 0, a.head_size * sizeof(T)); });
    task.clear_missing_keys(a.grad_thought_key, a.head_size);
    task.clear_missing_keys(a.grad_thought_value, a.value_size);
    if (task.rows == 0) return;
    float* keys = scratch.of_thread(thread);  // transposed
    float* values = keys + task.key_columns;  // transposed
    float* key_rows = values + task.value_columns;
    float* grad_keys = key_rows + task.key_floats;  // then those of the values
    float* queries = grad_keys + greater(task.key_floats, task.value_floats);
    float* grads = queries + task.query_floats;
    float* outputs = grads + task.output_floats;
    float* grad_queries = outputs + task.output_floats;
    float* probabilities = grad_queries + task.query_floats;
    float* grad_scores = probabilities + task.score_floats;
    float* slopes = grad_scores + task.score_floats;  // of a softcap
    const float scale = capped ? 1 : a.mask.scale;
    task.gather_rows(a.query, a.head_size, queries);
    task.gather_rows(a.grad_output, a.value_size, grads);
    task.gather_rows(a.output, a.value_size, outputs);
    task.transpose_keys(a.thought_key, a.head_size, keys);
    task.transpose_keys(a.thought_value, a.value_size, values);
    task.gather_keys(a.thought_key, a.head_size, key_rows);
    multiply({queries, task.width, 1}, keys, task.keys, task.rows, task.keys, a.head_size, {probabilities, task.keys});
    multiply({grads, task.value_width, 1}, values, task.keys, task.rows, task.keys, a.value_size,
             {grad_scores, task.keys});
    if (capped) cap({probabilities, task.keys}, task.rows, task.keys, a.mask, slopes);

    for (int64_t row = 0; row < task.rows; ++row) {
      float *probability = probabilities + row * task.keys, *grad_score = grad_scores + row * task.keys;
      const Range visible = task.keys_of(row);
      const float lse = *task.row_of(a.lse, row);
      Vec products{};
      for_vectors(0, task.value_width, [&](int64_t d, auto extent) {
        products +=
            load(grads + row * task.value_width + d, extent) * load(outputs + row * task.value_width + d, extent);
      });
      const float grad_lse = a.grad_lse.data ? *task.row_of(a.grad_lse, row) : 0;
      const float delta = sum_of(products) - grad_lse;
      for_vectors(0, visible.last, [&](int64_t t, auto) {
        const Vec s = load(probability + t, Whole{}) * scale;
        const Vec p = exp((inside(visible, t) ? s : splat(-kInfinity)) - lse);
        store(probability + t, p, Whole{});
        store(grad_score + t, p * (load(grad_score + t, Whole{}) - delta) * scale, Whole{});
      });
      for (int64_t t = padded(visible.last); t < task.keys; t += kLanes) {
        store(probability + t, Vec{}, Whole{});
        store(grad_score + t, Vec{}, Whole{});
      }
    }
    if (capped) multiply_by(slopes, {grad_scores, task.keys}, task.rows, task.keys);

    const auto write_keys = [&](const Steps<T>& gradient, const float* weights, const float* rows, int64_t size) {
      const int64_t width = padded(size);
      multiply({weights, 1, task.keys}, rows, width, task.thought_keys, width, task.rows, {grad_keys, width});
      T* first = task.key_of(gradient, 0);
      for (int64_t t = 0; t < task.thought_keys; ++t) {
        for_vectors(0, size, [&](int64_t d, auto extent) {
          store(first + t * gradient.step_stride + d, load(grad_keys + t * width + d, Whole{}), extent);
        });
      }
    };
    write_keys(a.grad_thought_key, grad_scores, queries, a.head_size);
    write_keys(a.grad_thought_value, probabilities, grads, a.value_size);

    multiply({grad_scores, task.keys, 1}, key_rows, task.width, task.rows, task.width, task.thought_keys,
             {grad_queries, task.width});
    for (int64_t row = 0; row < task.rows; ++row) {
      const float *own = grad_queries + row * task.width, *base = task.row_of(a.base_grad_query, row);
      T* to = task.row_of(a.grad_query, row);
      for_vectors(0, a.head_size, [&](int64_t d, auto extent) {
        store(to + d, load(own + d, Whole{}) + load(base + d, extent), extent);
      });
    }
  });
}

template void thought_forward(const ThoughtAttention<float>&);
template void thought_forward(const ThoughtAttention<BFloat16>&);
template void thought_backward(const ThoughtAttentionBackward<float>&);
template void thought_backward(const ThoughtAttentionBackward<BFloat16>&);

}  // namespace quietstar::cpu::QUIETSTAR_ISA
