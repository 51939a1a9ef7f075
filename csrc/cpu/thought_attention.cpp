// The diagonal part of thought attention: the queries behind one anchor against that anchor's own thought keys, merged
// with what the base keys gave.
//
// One task is an anchor and a key/value head: m = G·S rows (all heads of the group, all steps), T keys, D elements.
// Its rows are gathered in float32 and padded with zeros to whole vectors, so that everything is a product of small
// matrices that stay in the cache: 2 of them forward, 5 backward, 2 m T D FLOP each. Later steps are computed too and
// masked: at T = 12 skipping them would save little. From memory each tensor is read or written once.

#include "kernel_table.h"
#include "parallel.h"

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// An element a(i, k) of a small matrix or of its transpose.
struct Operand {
  const float* data;
  int64_t row_stride, column_stride;

  const float* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

// Rows · vectors of the result that are held in registers while the products are summed.
template <int kRows, int kVectors>
void multiply_block(Operand a, const float* b, float* c, int64_t width, int64_t depth) {
  Vec sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    for (int i = 0; i < kRows; ++i) {
      const float factor = *a.at(i, k);
      for (int j = 0; j < kVectors; ++j) sums[i][j] += factor * load(b + k * width + j * kLanes, Whole{});
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) store(c + i * width + j * kLanes, sums[i][j], Whole{});
  }
}

template <int kRows>
void multiply_rows(Operand a, const float* b, float* c, int64_t width, int64_t depth) {
  int64_t column = 0;
  for (; column + 2 * kLanes <= width; column += 2 * kLanes) {
    multiply_block<kRows, 2>(a, b + column, c + column, width, depth);
  }
  if (column < width) multiply_block<kRows, 1>(a, b + column, c + column, width, depth);
}

// c [rows, width] = a [rows, depth] · b [depth, width]; width in whole vectors.
void multiply(Operand a, const float* b, float* c, int64_t rows, int64_t width, int64_t depth) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    multiply_rows<4>({a.at(row, 0), a.row_stride, a.column_stride}, b, c + row * width, width, depth);
  }
  for (; row < rows; ++row) {
    multiply_rows<1>({a.at(row, 0), a.row_stride, a.column_stride}, b, c + row * width, width, depth);
  }
}

// One row of `size` elements in float32, with zeros behind it.
template <class T>
void gather(const T* from, float* to, int64_t size) {
  for_vectors(0, size, [&](int64_t d, auto extent) { store(to + d, load(from + d, extent), Whole{}); });
}

// What the tasks of one thread work in. Sizes in floats.
class Task {
 public:
  explicit Task(const ThoughtShape& shape)
      : steps_(shape.steps),
        thought_steps_(shape.thought_steps),
        head_size_(shape.head_size),
        rows(shape.query_heads / shape.kv_heads * shape.steps),
        keys(padded(shape.thought_steps)),
        width(padded(shape.head_size)) {}

  int64_t row_floats() const { return rows * width; }
  int64_t key_floats() const { return thought_steps_ * width; }
  int64_t transposed_floats() const { return head_size_ * keys; }
  int64_t score_floats() const { return rows * keys; }

  // Rows of all heads of the group, [m, width].
  template <class T>
  void gather_rows(const Steps<const T>& from, int64_t b, int64_t kv_head, int64_t anchor, float* to) const {
    const int64_t group = rows / steps_;
    for (int64_t row = 0; row < rows; ++row) {
      const T* head = from.at(b, kv_head * group + row / steps_, anchor);
      gather(head + row % steps_ * from.step_stride, to + row * width, head_size_);
    }
  }

  // The anchor's keys (or values) as they are, [T, width], and transposed, [D, keys]; either may be null.
  template <class T>
  void gather_keys(const Steps<const T>& from, int64_t b, int64_t kv_head, int64_t anchor, float* as_is,
                   float* transposed) const {
    if (transposed) memset(transposed, 0, transposed_floats() * sizeof(float));
    for (int64_t t = 0; t < thought_steps_; ++t) {
      const T* key = from.at(b, kv_head, anchor) + t * from.step_stride;
      if (as_is) gather(key, as_is + t * width, head_size_);
      if (!transposed) continue;
      for (int64_t d = 0; d < head_size_; ++d) transposed[d * keys + t] = load_one(key + d);
    }
  }

  // How many keys a row sees: its own step's and the earlier ones'.
  int64_t visible(int64_t row) const { return thought_steps_ - steps_ + row % steps_ + 1; }

  // Number of a row in a contiguous [B, Hq, P, S].
  int64_t number(const ThoughtShape& shape, int64_t b, int64_t kv_head, int64_t anchor, int64_t row) const {
    const int64_t head = kv_head * (rows / steps_) + row / steps_;
    return ((b * shape.query_heads + head) * shape.anchors + anchor) * steps_ + row % steps_;
  }

 private:
  int64_t steps_, thought_steps_, head_size_;

 public:
  const int64_t rows, keys, width;
};

// Calls body(batch, key/value head, anchor, thread) for all tasks.
template <class Body>
void for_tasks(const ThoughtShape& shape, Body body) {
  const int64_t tasks = shape.batch * shape.kv_heads * shape.anchors;
  const int64_t work = shape.query_heads / shape.kv_heads * shape.steps * shape.thought_steps * shape.head_size / 4;
  for_rows(tasks, useful_threads(tasks, work, shape.threads), [&](int64_t task, int thread) {
    body(task / (shape.kv_heads * shape.anchors), task / shape.anchors % shape.kv_heads, task % shape.anchors, thread);
  });
}

}  // namespace

template <class T>
void thought_forward(const ThoughtForward<T>& a) {
  const Task task(a);
  const Scratch scratch(task.transposed_floats() + task.key_floats() + 2 * task.row_floats() + task.score_floats(),
                        a.threads);
  for_tasks(a, [&](int64_t b, int64_t kv_head, int64_t anchor, int thread) {
    float* keys = scratch.of_thread(thread);  // [D, keys]
    float* values = keys + task.transposed_floats();
    float* queries = values + task.key_floats();
    float* outputs = queries + task.row_floats();
    float* scores = outputs + task.row_floats();  // [m, keys], then probabilities
    task.gather_rows(a.query, b, kv_head, anchor, queries);
    task.gather_keys(a.thought_key, b, kv_head, anchor, nullptr, keys);
    task.gather_keys(a.thought_value, b, kv_head, anchor, values, nullptr);
    multiply({queries, task.width, 1}, keys, scores, task.rows, task.keys, a.head_size);

    const int64_t group = task.rows / a.steps;
    const auto in_base = [&](const auto& tensor, int64_t row) {
      return tensor.at(b, kv_head * group + row / a.steps, anchor) + row % a.steps * tensor.step_stride;
    };
    float* shares = queries;  // of the base part, one per row; the queries have been used
    for (int64_t row = 0; row < task.rows; ++row) {
      float* score = scores + row * task.keys;
      const int64_t visible = task.visible(row);
      const float base_lse = *in_base(a.base_lse, row);
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
      for (int64_t t = padded(visible); t < task.keys; t += kLanes) store(score + t, Vec{}, Whole{});
      const float base = exp(base_lse - top), sum = sum_of(total) + base;
      a.lse[task.number(a, b, kv_head, anchor, row)] = top + logf(sum);
      shares[row] = base / sum;
      for_vectors(0, visible,
                  [&](int64_t t, auto) { store(score + t, load(score + t, Whole{}) * (1 / sum), Whole{}); });
    }

    multiply({scores, task.keys, 1}, values, outputs, task.rows, task.width, a.thought_steps);
    for (int64_t row = 0; row < task.rows; ++row) {
      const float *own = outputs + row * task.width, *base = in_base(a.base_output, row);
      T* output = in_base(a.output, row);
      for_vectors(0, a.head_size, [&](int64_t d, auto extent) {
        store(output + d, load(own + d, Whole{}) + shares[row] * load(base + d, extent), extent);
      });
    }
  });
}

template <class T>
void thought_backward(const ThoughtBackward<T>& a) {
  const Task task(a);
  const Scratch scratch(2 * task.transposed_floats() + task.key_floats() + 4 * task.row_floats() +
                            2 * task.score_floats() + task.key_floats(),
                        a.threads);
  for_tasks(a, [&](int64_t b, int64_t kv_head, int64_t anchor, int thread) {
    float* keys = scratch.of_thread(thread);  // [D, keys]
    float* values = keys + task.transposed_floats();
    float* key_rows = values + task.transposed_floats();  // [T, width]
    float* queries = key_rows + task.key_floats();
    float* grads = queries + task.row_floats();
    float* outputs = grads + task.row_floats();
    float* grad_queries = outputs + task.row_floats();
    float* probabilities = grad_queries + task.row_floats();  // [m, keys]
    float* grad_scores = probabilities + task.score_floats();
    float* grad_keys = grad_scores + task.score_floats();  // [T, width], then of the values
    task.gather_rows(a.query, b, kv_head, anchor, queries);
    task.gather_rows(a.grad_output, b, kv_head, anchor, grads);
    task.gather_rows(a.output, b, kv_head, anchor, outputs);
    task.gather_keys(a.thought_key, b, kv_head, anchor, key_rows, keys);
    task.gather_keys(a.thought_value, b, kv_head, anchor, nullptr, values);
    multiply({queries, task.width, 1}, keys, probabilities, task.rows, task.keys, a.head_size);
    multiply({grads, task.width, 1}, values, grad_scores, task.rows, task.keys, a.head_size);

    for (int64_t row = 0; row < task.rows; ++row) {
      float *probability = probabilities + row * task.keys, *grad_score = grad_scores + row * task.keys;
      const int64_t number = task.number(a, b, kv_head, anchor, row), visible = task.visible(row);
      const bool active = a.lse[number] != -kInfinity;
      const float lse = active ? a.lse[number] : kInfinity;  // exp(score − lse) is then 0
      Vec products{};
      for_vectors(0, a.head_size, [&](int64_t d, auto extent) {
        products += load(grads + row * task.width + d, extent) * load(outputs + row * task.width + d, extent);
      });
      const float delta = sum_of(products) - (a.grad_lse && active ? a.grad_lse[number] : 0);
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
      multiply({weights, 1, task.keys}, rows, grad_keys, a.thought_steps, task.width, task.rows);
      for (int64_t t = 0; t < a.thought_steps; ++t) {
        T* to = gradient.at(b, kv_head, anchor) + t * gradient.step_stride;
        for_vectors(0, a.head_size, [&](int64_t d, auto extent) {
          store(to + d, load(grad_keys + t * task.width + d, Whole{}), extent);
        });
      }
    };
    write_keys(a.grad_thought_key, grad_scores, queries);
    write_keys(a.grad_thought_value, probabilities, grads);

    multiply({grad_scores, task.keys, 1}, key_rows, grad_queries, task.rows, task.width, a.thought_steps);
    const int64_t group = task.rows / a.steps;
    for (int64_t row = 0; row < task.rows; ++row) {
      const int64_t head = kv_head * group + row / a.steps, step = row % a.steps;
      const float* base = a.base_grad_query.at(b, head, anchor) + step * a.base_grad_query.step_stride;
      T* to = a.grad_query.at(b, head, anchor) + step * a.grad_query.step_stride;
      for_vectors(0, a.head_size, [&](int64_t d, auto extent) {
        store(to + d, load(grad_queries + row * task.width + d, Whole{}) + load(base + d, extent), extent);
      });
    }
  });
}

template void thought_forward(const ThoughtForward<float>&);
template void thought_forward(const ThoughtForward<BFloat16>&);
template void thought_backward(const ThoughtBackward<float>&);
template void thought_backward(const ThoughtBackward<BFloat16>&);

}  // namespace quietstar::cpu::QUIETSTAR_ISA
