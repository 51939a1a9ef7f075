// The kernels of the cpu backend: their arguments, and the table of them that each instruction set fills.
//
// Rows lie `stride` elements apart, elements of a row side by side. A pointer that says "or null" is of something that
// is not wanted or not there. Rows are shared among at most `threads` threads.
#pragma once

#include <cstdint>

namespace quietstar::cpu {

struct BFloat16 {
  std::uint16_t bits;
};

template <class T>
struct Matrix {
  T* data;
  std::int64_t stride;

  T* row(std::int64_t number) const { return data + number * stride; }
};

// What all kernels of the mix read: z = b + w (t − b).
template <class T>
struct Mix {
  Matrix<const T> base, thought;
  const float* weight;
  std::int64_t rows, vocabulary;
  int threads;
};

template <class T>
struct MixForward : Mix<T> {
  T* mixed;  // contiguous
};

template <class T>
struct MixBackward : Mix<T> {
  Matrix<const T> grad;
  T *d_base, *d_thought;  // contiguous, or null
  float* d_weight;        // or null
};

template <class T>
struct MixedCrossEntropy : Mix<T> {
  const std::int64_t* target;
  float *nll, *slope, *largest, *log_total;
};

template <class T>
struct MixedCrossEntropyBackward : Mix<T> {
  const std::int64_t* target;
  const float *scale, *largest, *log_total;
  T *d_base, *d_thought;  // contiguous, or null
};

// Nll of the rows of softmax(hidden · weightᵀ / temperature), with hidden and weight of `size` columns, and the
// gradients of sum(scale · nll).
template <class T>
struct LinearCrossEntropy {
  Matrix<const T> hidden, weight;
  const std::int64_t* target;
  const float* scale;  // or null, if there is no gradient
  const std::int64_t* suppressed;
  std::int64_t suppressed_count;
  float temperature;
  float* room;  // for [rows rounded up to 12, vocabulary rounded up to 64]
  float* nll;
  float *d_hidden, *d_weight;  // contiguous, or null
  bool add;                    // d_weight to what is there
  std::int64_t rows, vocabulary, size;
  int threads;
};

// What both ways of sampling take.
struct Sample {
  std::int64_t* tokens;
  const std::int64_t* suppressed;
  std::int64_t suppressed_count;
  std::int64_t seed, first_row;
  float temperature;
  std::int64_t rows;
  int threads;
};

// From logits [rows, groups · 64], −∞ behind the vocabulary.
struct SampleRows : Sample {
  float* logits;       // contiguous; those of suppressed tokens are overwritten
  std::int64_t top_k;  // 0: all
  double top_p;        // 1: all
  std::int64_t groups;
};

// From what the logits are the products of: the rows of hidden and of weight, both of `size` columns.
template <class T>
struct LinearSample : Sample {
  Matrix<const T> hidden, weight;
  float* logits;  // room for [rows, vocabulary rounded up to groups of 64]
  std::int64_t vocabulary, size;
};

// A tensor [B, heads, P, steps, D] with neighbouring elements in the last dimension.
template <class T>
struct Steps {
  T* data;
  std::int64_t batch_stride, head_stride, anchor_stride, step_stride;

  T* at(std::int64_t batch, std::int64_t head, std::int64_t anchor) const {
    return data + batch * batch_stride + head * head_stride + anchor * anchor_stride;
  }
};

// Sizes of the base part; the key/value tensors have the base positions for steps. Anchor p of batch b sees the base
// keys first[b, p] <= l < last[b, p].
struct BaseShape {
  std::int64_t batch, query_heads, kv_heads, anchors, steps, length, head_size;
  float scale;
  int threads;
  const std::int64_t *first, *last;
};

// Of a lse, D = 1; it is −∞, and the output 0, where an anchor sees no key.
template <class T>
struct BaseForward : BaseShape {
  Steps<const T> query, key, value;
  Steps<float> output, lse;
};

// What reaches queries, keys and values through the base keys, given the output and lse over all keys.
template <class T>
struct BaseBackward : BaseShape {
  Steps<const T> query, key, value, output, grad_output;
  Steps<const float> lse, grad_lse;  // the data of grad_lse may be null
  Steps<float> grad_query, grad_key, grad_value;
};

struct ThoughtShape {
  std::int64_t batch, query_heads, kv_heads, anchors, steps, thought_steps, head_size;
  float scale;
  int threads;
};

// Merges attention over the base keys with that over an anchor's own thought keys. Of a lse, D = 1. The results may
// lie over the base part.
template <class T>
struct ThoughtForward : ThoughtShape {
  Steps<const T> query, thought_key, thought_value;
  Steps<const float> base_output, base_lse;
  Steps<T> output;
  Steps<float> lse;
};

// Gradients of the thought keys and values, and that of the queries with the part through the base keys added,
// which it may lie over.
template <class T>
struct ThoughtBackward : ThoughtShape {
  Steps<const T> query, thought_key, thought_value, output, grad_output;
  Steps<const float> base_grad_query, lse, grad_lse;  // the data of grad_lse may be null
  Steps<T> grad_query, grad_thought_key, grad_thought_value;
};

template <class T>
struct TypedKernels {
  void (*mix)(const MixForward<T>&);
  void (*mix_backward)(const MixBackward<T>&);
  void (*mixed_cross_entropy)(const MixedCrossEntropy<T>&);
  void (*mixed_cross_entropy_backward)(const MixedCrossEntropyBackward<T>&);
  void (*thought_forward)(const ThoughtForward<T>&);
  void (*thought_backward)(const ThoughtBackward<T>&);
  void (*linear_cross_entropy)(const LinearCrossEntropy<T>&);
  void (*linear_sample)(const LinearSample<T>&);
  void (*base_forward)(const BaseForward<T>&);
  void (*base_backward)(const BaseBackward<T>&);
};

struct Kernels {
  const char* name;
  TypedKernels<float> float32;
  TypedKernels<BFloat16> bfloat16;
  void (*sample_rows)(const SampleRows&);
  void (*exponential)(const float* x, float* result, std::int64_t count);
  void (*logarithm)(const float* x, float* result, std::int64_t count);
};

namespace baseline {
extern const Kernels kernels;
}
#ifdef QUIETSTAR_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

// Throws std::bad_alloc. Not inline, for vector.h.
[[noreturn]] void out_of_memory();

}  // namespace quietstar::cpu
