// The diagonal part of thought attention: the queries behind one anchor against that anchor's own thought keys, merged
// with what the base keys gave.
//
// One task is an anchor and a key/value head: m = G·S rows (all heads of the group, all steps), T keys, D elements.
// Its rows are gathered in float32 and padded with zeros to whole vectors, so that everything is a product of small
// matrices that stay in the cache: 2 of them forward, 5 backward, 2 m T D FLOP each. Later steps are computed too and
// masked: at T = 12 skipping them would save little. From memory each tensor is read or written once.

#include "kernel_table.h"
#include "parallel.h"
#include "tile.h"

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

int64_t padded(int64_t size) { return rounded_up(size, kLanes); }

// An anchor of one text, and a key/value head.
struct Place {
  int64_t batch, kv_head, anchor;
};

// The sizes of a task and where its rows and keys are found. Row g·S + s is step s of head g of the group.
struct Task {
  const int64_t group, steps, thought_steps, head_size;
  const int64_t rows = group * steps;                  // m
  const int64_t keys = padded(thought_steps);          // T in whole vectors
  const int64_t width = padded(head_size);             // D in whole vectors
  const int64_t row_floats = rows * width;             // [m, width]
  const int64_t score_floats = rows * keys;            // [m, keys]
  const int64_t key_floats = thought_steps * width;    // [T, width]
  const int64_t transposed_floats = head_size * keys;  // [D, keys]

  explicit Task(const ThoughtShape& shape)
      : group(shape.query_heads / shape.kv_heads),
        steps(shape.steps),
        thought_steps(shape.thought_steps),
        head_size(shape.head_size) {}

  // How many keys a row sees: its own step's and the earlier ones'.
  int64_t visible(int64_t row) const { return thought_steps - steps + row % steps + 1; }

  template <class T>
  T* row_of(const Steps<T>& tensor, Place place, int64_t row) const {
    return tensor.at(place.batch, place.kv_head * group + row / steps, place.anchor) + row % steps * tensor.step_stride;
  }

  template <class T>
  void gather_rows(const Steps<const T>& from, Place place, float* to) const {
    for (int64_t row = 0; row < rows; ++row) gather(row_of(from, place, row), to + row * width, head_size);
  }

  // The thought keys or values as they are, [T, width].
  template <class T>
  void gather_keys(const Steps<const T>& from, Place place, float* to) const {
    const T* first = from.at(place.batch, place.kv_head, place.anchor);
    for (int64_t t = 0; t < thought_steps; ++t) gather(first + t * from.step_stride, to + t * width, head_size);
  }

  template <class T>
  void clear_rows(const Steps<T>& tensor, Place place) const {
    for (int64_t row = 0; row < rows; ++row) memset(row_of(tensor, place, row), 0, head_size * sizeof(T));
  }

  // Those of thought keys or values.
  template <class T>
  void clear_keys(const Steps<T>& tensor, Place place) const {
    T* first = tensor.at(place.batch, place.kv_head, place.anchor);
    for (int64_t t = 0; t < thought_steps; ++t) memset(first + t * tensor.step_stride, 0, head_size * sizeof(T));
  }

  // The thought keys or values as columns, [D, keys].
  template <class T>
  void transpose_keys(const Steps<const T>& from, Place place, float* to) const {
    const T* first = from.at(place.batch, place.kv_head, place.anchor);
    memset(to, 0, transposed_floats * sizeof(float));
    for (int64_t t = 0; t < thought_steps; ++t) {
      for (int64_t d = 0; d < head_size; ++d) to[d * keys + t] = load_one(first + t * from.step_stride + d);
    }
  }
};

// Calls body(place, thread) for all tasks.
template <class Body>
void for_tasks(const ThoughtShape& shape, Body body) {
  const int64_t tasks = shape.batch * shape.kv_heads * shape.anchors;
  const int64_t work = shape.query_heads / shape.kv_heads * shape.steps * shape.thought_steps * shape.head_size / 4;
  for_rows(tasks, useful_threads(tasks, work, shape.threads), [&](int64_t task, int thread) {
    const int64_t head = task / shape.anchors;
    body(Place{head / shape.kv_heads, head % shape.kv_heads, task % shape.anchors}, thread);
  });
}

}  // namespace

template <class T>
void thought_forward(const ThoughtForward<T>& a) {
  const Task task(a);
  const Scratch scratch(task.transposed_floats + task.key_floats + 2 * task.row_floats + task.score_floats, a.threads);
  for_tasks(a, [&](Place place, int thread) {
    float* keys = scratch.of_thread(thread);  // transposed
    float* values = keys + task.transposed_floats;
    float* queries = values + task.key_floats;
    float* outputs = queries + task.row_floats;
    float* scores = outputs + task.row_floats;  // then probabilities
    task.gather_rows(a.query, place, queries);
    task.transpose_keys(a.thought_key, place, keys);
    task.gather_keys(a.thought_value, place, values);
    multiply({queries, task.width, 1}, keys, task.keys, task.rows, task.keys, a.head_size, {scores, task.keys});

    float* base_shares = queries;  // one per row; the queries have been used
    for (int64_t row = 0; row < task.rows; ++row) {
      float* score = scores + row * task.keys;
      const int64_t visible = task.visible(row);
      const float base_lse = *task.row_of(a.base_lse, place, row);
      Vec highest = splat(base_lse);
      for_vectors(0, visible, [&](int64_t t, auto extent) {
        const Vec s = inside_or(load(score + t, Whole{}) * a.scale, -kInfinity, extent);
        store(score + t, s, Whole{});
        highest = larger(s, highest);
      });
      const float top = largest_of(highest);
      Vec total{};
      for_vectors(0, visible, [&](int64_t t, auto) {
        const Vec e = exp(load(score + t, Whole{}) - top);
        store(score + t, e, Whole{});
        total += e;
      });
      const float base = exp(base_lse - top), sum = sum_of(total) + base;
      for_vectors(0, visible,
                  [&](int64_t t, auto) { store(score + t, load(score + t, Whole{}) * (1 / sum), Whole{}); });
      for (int64_t t = padded(visible); t < task.keys; t += kLanes) store(score + t, Vec{}, Whole{});
      *task.row_of(a.lse, place, row) = top + logf(sum);
      base_shares[row] = base / sum;
    }

    multiply({scores, task.keys, 1}, values, task.width, task.rows, task.width, a.thought_steps, {outputs, task.width});
    for (int64_t row = 0; row < task.rows; ++row) {
      const float *own = outputs + row * task.width, *base = task.row_of(a.base_output, place, row);
      T* output = task.row_of(a.output, place, row);
      for_vectors(0, a.head_size, [&](int64_t d, auto extent) {
        store(output + d, load(own + d, Whole{}) + base_shares[row] * load(base + d, extent), extent);
      });
    }
  });
}

template <class T>
void thought_backward(const ThoughtBackward<T>& a) {
  const Task task(a);
  const Scratch scratch(2 * task.transposed_floats + 2 * task.key_floats + 4 * task.row_floats + 2 * task.score_floats,
                        a.threads);
  for_tasks(a, [&](Place place, int thread) {
    float* keys = scratch.of_thread(thread);        // transposed
    float* values = keys + task.transposed_floats;  // transposed
    float* key_rows = values + task.transposed_floats;
    float* grad_keys = key_rows + task.key_floats;  // then those of the values
    float* queries = grad_keys + task.key_floats;
    float* grads = queries + task.row_floats;
    float* outputs = grads + task.row_floats;
    float* grad_queries = outputs + task.row_floats;
    float* probabilities = grad_queries + task.row_floats;
    float* grad_scores = probabilities + task.score_floats;
    if (*task.row_of(a.lse, place, 0) == -kInfinity) {  // an inactive anchor: whatever it has may be NaN
      task.clear_rows(a.grad_query, place);
      task.clear_keys(a.grad_thought_key, place);
      task.clear_keys(a.grad_thought_value, place);
      return;
    }
    task.gather_rows(a.query, place, queries);
    task.gather_rows(a.grad_output, place, grads);
    task.gather_rows(a.output, place, outputs);
    task.transpose_keys(a.thought_key, place, keys);
    task.transpose_keys(a.thought_value, place, values);
    task.gather_keys(a.thought_key, place, key_rows);
    multiply({queries, task.width, 1}, keys, task.keys, task.rows, task.keys, a.head_size, {probabilities, task.keys});
    multiply({grads, task.width, 1}, values, task.keys, task.rows, task.keys, a.head_size, {grad_scores, task.keys});

    for (int64_t row = 0; row < task.rows; ++row) {
      float *probability = probabilities + row * task.keys, *grad_score = grad_scores + row * task.keys;
      const int64_t visible = task.visible(row);
      const float lse = *task.row_of(a.lse, place, row);
      Vec products{};
      for_vectors(0, task.width, [&](int64_t d, auto extent) {
        products += load(grads + row * task.width + d, extent) * load(outputs + row * task.width + d, extent);
      });
      const float grad_lse = a.grad_lse.data ? *task.row_of(a.grad_lse, place, row) : 0;
      const float delta = sum_of(products) - grad_lse;
      for_vectors(0, visible, [&](int64_t t, auto extent) {
        const Vec p = exp(inside_or(load(probability + t, Whole{}) * a.scale, -kInfinity, extent) - lse);
        store(probability + t, p, Whole{});
        store(grad_score + t, p * (load(grad_score + t, Whole{}) - delta) * a.scale, Whole{});
      });
      for (int64_t t = padded(visible); t < task.keys; t += kLanes) {
        store(probability + t, Vec{}, Whole{});
        store(grad_score + t, Vec{}, Whole{});
      }
    }

    const auto write_keys = [&](const Steps<T>& gradient, const float* weights, const float* rows) {
      multiply({weights, 1, task.keys}, rows, task.width, a.thought_steps, task.width, task.rows,
               {grad_keys, task.width});
      T* first = gradient.at(place.batch, place.kv_head, place.anchor);
      for (int64_t t = 0; t < a.thought_steps; ++t) {
        for_vectors(0, a.head_size, [&](int64_t d, auto extent) {
          store(first + t * gradient.step_stride + d, load(grad_keys + t * task.width + d, Whole{}), extent);
        });
      }
    };
    write_keys(a.grad_thought_key, grad_scores, queries);
    write_keys(a.grad_thought_value, probabilities, grads);

    multiply({grad_scores, task.keys, 1}, key_rows, task.width, task.rows, task.width, a.thought_steps,
             {grad_queries, task.width});
    for (int64_t row = 0; row < task.rows; ++row) {
      const float *own = grad_queries + row * task.width, *base = task.row_of(a.base_grad_query, place, row);
      T* to = task.row_of(a.grad_query, place, row);
      for_vectors(0, a.head_size, [&](int64_t d, auto extent) {
        store(to + d, load(own + d, Whole{}) + load(base + d, extent), extent);
      });
    }
  });
}

template void thought_forward(const ThoughtForward<float>&);
template void thought_forward(const ThoughtForward<BFloat16>&);
template void thought_backward(const ThoughtBackward<float>&);
template void thought_backward(const ThoughtBackward<BFloat16>&);

}  // namespace quietstar::cpu::QUIETSTAR_ISA
