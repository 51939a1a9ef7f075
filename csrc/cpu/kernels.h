// The kernels of the cpu backend: their arguments, and the table of them that each instruction set fills.
//
// Rows are `stride` elements apart, and the elements of a row are adjacent. "or null" marks pointers that are null if a
// result is not needed or an input not given. Rows are distributed over at most `threads` threads.
#pragma once

#include <cstdint>

#include "quietstar/thought_mask.h"

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

// The inputs of all kernels of the mix z = b + w (t − b).
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

// Nll and entropy of the rows of softmax(hidden · weightᵀ / temperature), with hidden and weight of `size` columns and
// the products capped by softcap, and the gradients of sum(scale · nll) − sum(entropy_scale · entropy).
template <class T>
struct LinearCrossEntropy {
  Matrix<const T> hidden, weight;
  const std::int64_t* target;
  const float* scale;          // or null, if there is no gradient
  const float* entropy_scale;  // or null, if there is no gradient of the entropy
  const std::int64_t* suppressed;
  std::int64_t suppressed_count;
  float temperature, softcap;  // softcap 0: none
  float* room;                 // for [rows rounded up to 12, vocabulary rounded up to 64]
  float* nll;
  float* entropy;              // or null
  float *d_hidden, *d_weight;  // contiguous, or null
  bool add;                    // d_weight to what is there
  std::int64_t rows, vocabulary, size;
  int threads;
};

// The arguments of both ways of sampling.
struct Sample {
  std::int64_t* tokens;
  const std::int64_t* suppressed;
  std::int64_t suppressed_count;
  std::int64_t seed, first_row;
  float temperature, softcap;  // softcap 0: none
  std::int64_t rows;
  int threads;
};

// Sampling from logits [rows, groups · 64], −∞ after the vocabulary.
struct SampleRows : Sample {
  float* logits;       // contiguous; those of suppressed tokens are overwritten
  std::int64_t top_k;  // 0: all
  double top_p;        // 1: all
  std::int64_t groups;
};

// Sampling from the factors of the logits: the rows of hidden and of weight, both with `size` columns.
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

// Sizes of thought attention and its mask. Keys and values of the base have the base positions for steps.
struct ThoughtShape {
  std::int64_t batch, query_heads, kv_heads, anchors, steps, thought_steps, length, head_size, value_size;
  ThoughtMask mask;
  int threads;
};

// Attention in two parts. The part over the base keys writes its output to base_output and its log-sum-exp (−∞ without
// keys) to lse (D = 1), but nothing for queries that see no key at all. The part over the thought keys merges both; its
// output may overwrite that of the base part.
template <class T>
struct ThoughtAttention : ThoughtShape {
  Steps<const T> query, key, value, thought_key, thought_value;
  Steps<float> base_output, lse;
  Steps<T> output;
};

// The gradients, likewise: first those of queries, keys and values through the base keys; then those of thought keys
// and values, and that of the queries, to which base_grad_query is added and which may overwrite it.
template <class T>
struct ThoughtAttentionBackward : ThoughtShape {
  Steps<const T> query, key, value, thought_key, thought_value, output, grad_output;
  Steps<const float> lse, grad_lse;  // the data of grad_lse may be null
  Steps<float> base_grad_query, grad_key, grad_value;
  Steps<T> grad_query, grad_thought_key, grad_thought_value;
};

template <class T>
struct TypedKernels {
  void (*mix)(const MixForward<T>&);
  void (*mix_backward)(const MixBackward<T>&);
  void (*mixed_cross_entropy)(const MixedCrossEntropy<T>&);
  void (*mixed_cross_entropy_backward)(const MixedCrossEntropyBackward<T>&);
  void (*thought_forward)(const ThoughtAttention<T>&);
  void (*thought_backward)(const ThoughtAttentionBackward<T>&);
  void (*linear_cross_entropy)(const LinearCrossEntropy<T>&);
  void (*linear_sample)(const LinearSample<T>&);
  void (*base_forward)(const ThoughtAttention<T>&);
  void (*base_backward)(const ThoughtAttentionBackward<T>&);
};

struct Kernels {
  const char* name;
  TypedKernels<float> float32;
  TypedKernels<BFloat16> bfloat16;
  void (*sample_rows)(const SampleRows&);
  void (*exponential)(const float* x, float* result, std::int64_t count);
  void (*logarithm)(const float* x, float* result, std::int64_t count);
  void (*hyperbolic_tangent)(const float* x, float* result, std::int64_t count);
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
