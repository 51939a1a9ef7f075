// The base part of thought attention: the queries behind every anchor against the base keys that the anchor sees.
//
// As in FlashAttention (Dao et al., NeurIPS 2022), scores exist for one block of keys at a time. A task is a block of
// anchors and a key/value head: its rows are those of all heads of the group and of all steps that exist, so that a key
// is loaded once for many rows. Scores are transposed, [keys, rows]: rows lie in the lanes of a vector, and keys and
// values are used as they lie in memory.
//
// What is not seen may be NaN, and 0 · NaN is NaN: a block of which no row sees some keys is copied, with zeros for
// those, and rows that see no key are taken for zeros.

#include "kernel_table.h"
#include "parallel.h"
#include "thought_mask.h"

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

constexpr int64_t kKeys = 32;          // of a block
constexpr int64_t kRowsOfATask = 128;  // about; a task has at least one anchor

// The base keys or values of all heads in float32, with whole vectors in a row: as they are, or else a copy.
class BaseRows {
 public:
  template <class T>
  BaseRows(const ThoughtShape& shape, const Steps<const T>& from, int64_t size)
      : kv_heads_(shape.kv_heads),
        width_(rounded_up(size, kLanes)),
        copy_(usable(from, size) ? 0 : shape.batch * shape.kv_heads * shape.length * width_, 1) {
    if (usable(from, size)) {
      given_ = {(const float*)from.data, from.batch_stride, from.head_stride, 0, from.step_stride};
      return;
    }
    given_ = {copy_.of_thread(0), shape.kv_heads * shape.length * width_, shape.length * width_, 0, width_};
    for_rows(shape.batch * shape.kv_heads * shape.length, shape.threads, [&](int64_t row, int) {
      const int64_t head = row / shape.length;
      const T* first = from.at(head / shape.kv_heads, head % shape.kv_heads, 0);
      gather(first + row % shape.length * from.step_stride, copy_.of_thread(0) + row * width_, size);
    });
  }

  const float* row(int64_t head, int64_t key) const {
    return given_.at(head / kv_heads_, head % kv_heads_, 0) + key * stride();
  }

  int64_t stride() const { return given_.step_stride; }

 private:
  static bool usable(const Steps<const float>&, int64_t size) { return size % kLanes == 0; }
  static bool usable(const Steps<const BFloat16>&, int64_t) { return false; }

  int64_t kv_heads_, width_;
  Scratch copy_;
  Steps<const float> given_;
};

// Anchors of one text whose rows are a task of each key/value head.
struct Block {
  int64_t batch, first_anchor, end_anchor;
};

// The blocks of all texts, and how large they are.
class Blocks {
 public:
  explicit Blocks(const ThoughtShape& shape)
      : shape(shape),
        group(shape.query_heads / shape.kv_heads),
        most_rows_(smaller(greater(kRowsOfATask / (group * shape.steps), 1), shape.anchors) * group * shape.steps),
        memory_((shape.batch * shape.anchors * sizeof(Block) + (shape.batch + 1) * sizeof(int64_t)) / sizeof(float), 1),
        blocks_((Block*)memory_.of_thread(0)),
        begin_((int64_t*)(blocks_ + shape.batch * shape.anchors)) {
    for (int64_t batch = 0; batch < shape.batch; ++batch) {
      begin_[batch] = count_;
      int64_t rows = most_rows_;  // of the last block
      for (int64_t anchor = 0; anchor < shape.anchors; ++anchor) {
        const int64_t more = group * Sight(shape, batch, anchor).queries();
        if (more == 0) continue;
        if (rows + more > most_rows_) blocks_[count_++] = {batch, anchor, 0}, rows = 0;
        blocks_[count_ - 1].end_anchor = anchor + 1;
        rows += more;
      }
      most_ = greater(most_, count_ - begin_[batch]);
    }
    begin_[shape.batch] = count_;
  }

  const ThoughtShape& shape;
  const int64_t group;

  const Block& operator[](int64_t number) const { return blocks_[number]; }
  int64_t count() const { return count_; }
  int64_t begin_of(int64_t batch) const { return begin_[batch]; }
  int64_t most_of_a_text() const { return most_; }
  int64_t most_rows() const { return rounded_up(most_rows_, kLanes); }

 private:
  const int64_t most_rows_;
  const Scratch memory_;
  Block* const blocks_;
  int64_t* const begin_;
  int64_t count_ = 0, most_ = 0;
};

// Which keys of a block some row sees: a bit for each.
using Seen = uint32_t;
static_assert(kKeys <= 32, "a block's keys are the bits of Seen");

// The rows of one task, where they lie in the tensors, and which keys they see. Those of an anchor are its heads', one
// after the other; of each head those of the steps that exist.
class Task {
 public:
  Task(const Blocks& blocks, int64_t number, int64_t kv_head, float* memory)
      : most_rows_(blocks.most_rows()),
        first_((int32_t*)memory),
        last_(first_ + most_rows_),
        places_((Place*)(last_ + most_rows_)),
        seen_((Keys*)(places_ + most_rows_)) {
    const Block& block = blocks[number];
    batch_ = block.batch;
    for (int64_t anchor = block.first_anchor; anchor < block.end_anchor; ++anchor) {
      const Sight sight(blocks.shape, block.batch, anchor);
      const int64_t queries = sight.queries();
      if (queries == 0) continue;
      const Range seen = sight.base_keys(0);  // the later ones see no others
      if (!seen.empty()) seen_[num_seen_++] = {(int32_t)seen.first, (int32_t)seen.last};
      for (int64_t head = 0; head < blocks.group; ++head) {
        for (int64_t query = 0; query < queries; ++query, ++rows_) {
          const Range keys = sight.base_keys(query);
          first_[rows_] = (int32_t)keys.first, last_[rows_] = (int32_t)keys.last;
          places_[rows_] = {(int32_t)anchor, (int32_t)(kv_head * blocks.group + head), (int32_t)query};
        }
      }
    }
    for (int64_t row = rows_; row < most_rows_; ++row) first_[row] = last_[row] = 0;
  }

  // Of memory for a row.
  static constexpr int kFloats = 7;

  int64_t rows() const { return rows_; }

  // The first keys of rows, and the ends; those behind the last row see none.
  const int32_t* first() const { return first_; }
  const int32_t* last() const { return last_; }

  // The keys that any row sees, and maybe some in front of them: whole blocks.
  Range keys() const {
    if (num_seen_ == 0) return {0, 0};
    Range all{INT32_MAX, 0};
    for (int64_t i = 0; i < num_seen_; ++i) {
      all = {smaller(all.first, seen_[i].first / kKeys * kKeys), greater(all.last, seen_[i].last)};
    }
    return all;
  }

  Seen seen(int64_t block) const {
    Seen seen = 0;
    for (int64_t i = 0; i < num_seen_; ++i) {
      const int64_t first = greater(seen_[i].first - block, 0), last = smaller(seen_[i].last - block, kKeys);
      if (first < last) seen |= ~Seen{0} >> (32 - (last - first)) << first;
    }
    return seen;
  }

  template <class T>
  T* row_of(const Steps<T>& tensor, int64_t row) const {
    const Place place = places_[row];
    return tensor.at(batch_, place.head, place.anchor) + place.query * tensor.step_stride;
  }

  // As rows [rows, size in whole vectors].
  template <class T>
  void gather_rows(const Steps<const T>& from, int64_t size, float* to) const {
    const int64_t width = rounded_up(size, kLanes);
    for (int64_t row = 0; row < rows_; ++row, to += width) {
      if (sees_none(row)) {
        memset(to, 0, width * sizeof(float));
      } else {
        gather(row_of(from, row), to, size);
      }
    }
  }

  // As columns [size, most_rows], with zeros behind the last.
  template <class T>
  void gather_columns(const Steps<const T>& from, int64_t size, float* to) const {
    memset(to, 0, size * most_rows_ * sizeof(float));
    for (int64_t row = 0; row < rows_; ++row) {
      if (sees_none(row)) continue;
      const T* place = row_of(from, row);
      for (int64_t d = 0; d < size; ++d) to[d * most_rows_ + row] = load_one(place + d);
    }
  }

  // The inverse of gather_rows.
  void scatter_rows(const float* from, int64_t size, const Steps<float>& to) const {
    const int64_t width = rounded_up(size, kLanes);
    for (int64_t row = 0; row < rows_; ++row) {
      float* place = row_of(to, row);
      for_vectors(0, size,
                  [&](int64_t d, auto extent) { store(place + d, load(from + row * width + d, Whole{}), extent); });
    }
  }

 private:
  struct Place {
    int32_t anchor, head, query;
  };
  struct Keys {
    int32_t first, last;
  };

  bool sees_none(int64_t row) const { return first_[row] >= last_[row]; }

  const int64_t most_rows_;
  int32_t *const first_, *const last_;
  Place* const places_;
  Keys* const seen_;  // what each anchor sees, of those that see any
  int64_t batch_, rows_ = 0, num_seen_ = 0;
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
void base_forward(const ThoughtAttention<T>& a) {
  const Blocks blocks(a);
  const BaseRows keys(a, a.key, a.head_size), values(a, a.value, a.value_size);
  const int64_t width = rounded_up(a.value_size, kLanes), most = blocks.most_rows();
  const bool capped = a.mask.softcap != 0;
  const Scratch scratch(most * (a.head_size + width + kKeys + 3 + Task::kFloats) + kKeys * width, a.threads);
  for_rows(a.kv_heads * blocks.count(), a.threads, [&](int64_t number, int thread) {
    const int64_t kv_head = number / blocks.count(), anchors = number % blocks.count();
    const int64_t head = blocks[anchors].batch * a.kv_heads + kv_head;
    float* queries = scratch.of_thread(thread);  // columns
    float* outputs = queries + most * a.head_size;
    float* scores = outputs + most * width;  // then exponentials
    float* tops = scores + most * kKeys;
    float* sums = tops + most;
    float* shrinks = sums + most;
    const float scale = capped ? 1 : a.mask.scale;  // a capped score has been scaled
    const Task task(blocks, anchors, kv_head, shrinks + most);
    float* seen_values = shrinks + most * (1 + Task::kFloats);
    const int64_t rows = task.rows(), wide = rounded_up(rows, kLanes);
    task.gather_columns(a.query, a.head_size, queries);
    memset(outputs, 0, rows * width * sizeof(float));
    for (int64_t row = 0; row < wide; ++row) tops[row] = kLowest, sums[row] = 0;

    const Range all = task.keys();
    for (int64_t block = all.first; block < all.last; block += kKeys) {
      const int64_t inside = smaller(kKeys, a.length - block);
      const Seen seen = task.seen(block);
      if (seen == 0) continue;
      multiply({keys.row(head, block), keys.stride(), 1}, queries, most, inside, wide, a.head_size, {scores, most});
      if (capped) cap({scores, most}, inside, wide, a.mask);
      for (int64_t row = 0; row < wide; row += kLanes) {
        const IntVec first = load(task.first() + row), last = load(task.last() + row);
        const Vec top = load(tops + row, Whole{});
        Vec highest = top, total{};
        for (int64_t key = 0; key < inside; ++key) {
          const int32_t number = (int32_t)(block + key);
          float* score = scores + key * most + row;
          const Vec s = ((first <= number) & (number < last)) ? load(score, Whole{}) * scale : splat(-kInfinity);
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
      const BlockRows value_rows(values, head, block, inside, seen, width, seen_values);
      multiply({scores, 1, most}, value_rows.data, value_rows.stride, rows, width, inside, {outputs, width}, true);
    }

    for (int64_t row = 0; row < rows; ++row) {
      float* output = outputs + row * width;
      const float factor = sums[row] != 0 ? 1 / sums[row] : 0;
      for (int64_t d = 0; d < width; d += kLanes) store(output + d, load(output + d, Whole{}) * factor, Whole{});
      *task.row_of(a.lse, row) = sums[row] != 0 ? tops[row] + logf(sums[row]) : -kInfinity;
    }
    task.scatter_rows(outputs, a.value_size, a.base_output);
  });
}

template <class T>
void base_backward(const ThoughtAttentionBackward<T>& a) {
  const Blocks blocks(a);
  const BaseRows keys(a, a.key, a.head_size), values(a, a.value, a.value_size);
  const int64_t width = rounded_up(a.head_size, kLanes), value_width = rounded_up(a.value_size, kLanes);
  const int64_t most = blocks.most_rows(), heads = a.batch * a.kv_heads;
  const bool capped = a.mask.softcap != 0;
  // The gradients of keys and values are sums over tasks. Few long chains of tasks, two for every thread, add up their
  // own; a chain takes every so many-th block of anchors, because later ones see more keys.
  const int64_t wanted = (2 * a.threads + heads - 1) / heads, chains = smaller(wanted, blocks.most_of_a_text());
  const int64_t key_floats = a.length * width, floats = key_floats + a.length * value_width;
  const Scratch sums(floats * heads * chains, 1);
  const auto sums_of_chain = [&](int64_t head, int64_t chain) {
    return sums.of_thread(0) + (head * chains + chain) * floats;
  };
  const Scratch scratch(
      most * (a.head_size + a.value_size + 2 * width + value_width + (capped ? 3 : 2) * kKeys + 2 + Task::kFloats) +
          kKeys * (width + value_width),
      a.threads);
  for_rows(heads * chains, a.threads, [&](int64_t number, int thread) {
    const int64_t head = number / chains, chain = number % chains, batch = head / a.kv_heads;
    float *grad_keys = sums_of_chain(head, chain), *grad_values = grad_keys + key_floats;
    memset(grad_keys, 0, floats * sizeof(float));
    float* query_columns = scratch.of_thread(thread);
    float* grad_columns = query_columns + most * a.head_size;
    float* queries = grad_columns + most * a.value_size;
    float* grads = queries + most * width;
    float* grad_queries = grads + most * value_width;
    float* probabilities = grad_queries + most * width;
    float* grad_scores = probabilities + most * kKeys;
    float* slopes = grad_scores + most * kKeys;  // of a softcap
    float* lses = slopes + (capped ? most * kKeys : 0);
    float* deltas = lses + most;
    float* seen_keys = deltas + most * (1 + Task::kFloats);
    float* seen_values = seen_keys + kKeys * width;
    const float scale = capped ? 1 : a.mask.scale;
    for (int64_t anchors = blocks.begin_of(batch) + chain; anchors < blocks.begin_of(batch + 1); anchors += chains) {
      const Task task(blocks, anchors, head % a.kv_heads, deltas + most);
      const int64_t rows = task.rows(), wide = rounded_up(rows, kLanes);
      task.gather_columns(a.query, a.head_size, query_columns);
      task.gather_columns(a.grad_output, a.value_size, grad_columns);
      task.gather_rows(a.query, a.head_size, queries);
      task.gather_rows(a.grad_output, a.value_size, grads);
      memset(grad_queries, 0, rows * width * sizeof(float));
      for (int64_t row = 0; row < wide; ++row) {
        lses[row] = kInfinity, deltas[row] = 0;  // exp(score − lse) is then 0
        if (row >= rows || *task.row_of(a.lse, row) == -kInfinity) continue;
        const T* output = task.row_of(a.output, row);
        Vec products{};
        for_vectors(0, a.value_size, [&](int64_t d, auto extent) {
          products += load(grads + row * value_width + d, Whole{}) * load(output + d, extent);
        });
        lses[row] = *task.row_of(a.lse, row);
        deltas[row] = sum_of(products) - (a.grad_lse.data ? *task.row_of(a.grad_lse, row) : 0);
      }

      const Range all = task.keys();
      for (int64_t block = all.first; block < all.last; block += kKeys) {
        const int64_t inside = smaller(kKeys, a.length - block);
        const Seen seen = task.seen(block);
        if (seen == 0) continue;
        const BlockRows key_rows(keys, head, block, inside, seen, width, seen_keys);
        const BlockRows value_rows(values, head, block, inside, seen, value_width, seen_values);
        multiply({key_rows.data, key_rows.stride, 1}, query_columns, most, inside, wide, a.head_size,
                 {probabilities, most});
        multiply({value_rows.data, value_rows.stride, 1}, grad_columns, most, inside, wide, a.value_size,
                 {grad_scores, most});
        if (capped) cap({probabilities, most}, inside, wide, a.mask, slopes);
        for (int64_t row = 0; row < wide; row += kLanes) {
          const IntVec first = load(task.first() + row), last = load(task.last() + row);
          const Vec lse = load(lses + row, Whole{}), delta = load(deltas + row, Whole{});
          for (int64_t key = 0; key < inside; ++key) {
            const int32_t number = (int32_t)(block + key);
            float *probability = probabilities + key * most + row, *grad_score = grad_scores + key * most + row;
            const Vec s = load(probability, Whole{}) * scale - lse;
            const Vec p = exp(((first <= number) & (number < last)) ? s : splat(-kInfinity));
            store(probability, p, Whole{});
            store(grad_score, p * (load(grad_score, Whole{}) - delta) * scale, Whole{});
          }
        }
        if (capped) multiply_by(slopes, {grad_scores, most}, inside, wide);
        multiply({grad_scores, most, 1}, queries, width, inside, width, rows, {grad_keys + block * width, width}, true);
        multiply({probabilities, most, 1}, grads, value_width, inside, value_width, rows,
                 {grad_values + block * value_width, value_width}, true);
        multiply({grad_scores, 1, most}, key_rows.data, key_rows.stride, rows, width, inside, {grad_queries, width},
                 true);
      }
      task.scatter_rows(grad_queries, a.head_size, a.base_grad_query);
    }
  });

  for_rows(heads * a.length, a.threads, [&](int64_t number, int) {
    const int64_t head = number / a.length, key = number % a.length;
    const auto add_up = [&](const Steps<float>& to, int64_t size, int64_t place) {
      float* row = to.at(head / a.kv_heads, head % a.kv_heads, 0) + key * to.step_stride;
      for_vectors(0, size, [&](int64_t d, auto extent) {
        Vec sum{};
        for (int64_t chain = 0; chain < chains; ++chain) {
          sum += load(sums_of_chain(head, chain) + place + d, Whole{});
        }
        store(row + d, sum, extent);
      });
    };
    add_up(a.grad_key, a.head_size, key * width);
    add_up(a.grad_value, a.value_size, key_floats + key * value_width);
  });
}

template void base_forward(const ThoughtAttention<float>&);
template void base_forward(const ThoughtAttention<BFloat16>&);
template void base_backward(const ThoughtAttentionBackward<float>&);
template void base_backward(const ThoughtAttentionBackward<BFloat16>&);

}  // namespace quietstar::cpu::QUIETSTAR_ISA
