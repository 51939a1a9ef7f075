// The kernels of the cuda backend declared for C++, with plain arguments; defined in the .cuh files of the same names.
//
// Rows are `stride` elements apart, and the elements of a row are adjacent; "contiguous" means that there are no gaps.
// "or null" marks pointers that are null if a result is not needed or an input not given. Logits may begin anywhere; if
// the rows of all tensors begin at the same address modulo 16 bytes, accesses have 16 bytes.
#pragma once

#include <cstdint>

#include "quietstar/contract.h"
#include "quietstar/thought_mask.h"

namespace quietstar::cuda {

// The device and cudaStream_t, given by the caller, on which kernels run.
struct Launch {
  int device;
  void* stream;
};

struct MatrixIn {
  const void* data;
  std::int64_t stride;
};

// The inputs of all kernels of the mix z = b + w (t − b).
struct Mix {
  MatrixIn base, thought;
  const float* weight;
  std::int64_t rows, vocabulary;
};

struct MixForward {
  Mix mix;
  void* mixed;  // contiguous
};

struct MixBackward {
  Mix mix;
  MatrixIn grad;
  void *d_base, *d_thought;  // contiguous, or null
  float* d_weight;           // or null
};

struct MixedCrossEntropy {
  Mix mix;
  const std::int64_t* target;
  float *nll, *slope, *largest, *log_total;
};

struct MixedCrossEntropyBackward {
  Mix mix;
  const std::int64_t* target;
  const float *scale, *largest, *log_total;
  void *d_base, *d_thought;  // contiguous, or null
};

void mix(DType dtype, const MixForward& arguments, const Launch& where);
void mix_backward(DType dtype, const MixBackward& arguments, const Launch& where);
void mixed_cross_entropy(DType dtype, const MixedCrossEntropy& arguments, const Launch& where);
void mixed_cross_entropy_backward(DType dtype, const MixedCrossEntropyBackward& arguments, const Launch& where);

// Logits [rows, vocabulary] in float32, overwritten with the gradient of sum(scale · nll) − sum(entropy_scale ·
// entropy) in gradient_dtype, whose rows begin where those of the logits do. Without scale there is no gradient.
struct CrossEntropyRows {
  float* logits;
  std::int64_t stride;
  const std::int64_t* target;
  const float *scale, *entropy_scale;  // or null
  float* nll;
  float* entropy;                      // or null
  float inverse_temperature, softcap;  // softcap 0: none
  std::int64_t rows, vocabulary;
};

void cross_entropy_rows(DType gradient_dtype, const CrossEntropyRows& arguments, const Launch& where);

// Logits [rows, groups · 64], contiguous, aligned to 16 bytes, −∞ after the vocabulary and for suppressed tokens. They
// are capped in place.
struct SampleRows {
  float* logits;
  const std::int64_t* seed;
  std::int64_t* tokens;
  std::int64_t first_row;
  float temperature;   // positive
  float softcap;       // 0: none
  std::int64_t top_k;  // 0: all
  double top_p;        // 1: all
  std::int64_t rows, groups;
};

void sample_rows(const SampleRows& arguments, const Launch& where);

// A tensor [B, heads, P, steps, D] with neighbouring elements in the last dimension, or [B, heads, L, D] without steps.
struct Steps {
  const void* data;
  std::int64_t batch_stride, head_stride, anchor_stride, step_stride;
};

// Attention of thoughts, without gradients: see thought_attention/api.py.
constexpr std::int64_t kLargestHead = 128;
constexpr std::int64_t kTileRows = 128;  // largest number of query rows, of one key/value head, in a block

struct ThoughtAttention {
  Steps query, key, value, thought_key, thought_value;  // anchor_stride of key and value: from one position to the next
  ThoughtMask mask;
  void* output;  // contiguous [B, Hq, P, S, Dv]
  float* lse;    // contiguous [B, Hq, P, S]
  // Results of every split, contiguous: [splits, B, Hq, P, S, Dv] and [splits, B, Hq, P, S]; null if there is only one.
  float *split_output, *split_lse;
  std::int64_t batch, query_heads, kv_heads, anchors_per_batch, steps, thought_steps, length, head_size, value_size,
      splits;
};

void thought_attention(DType dtype, const ThoughtAttention& arguments, const Launch& where);

}  // namespace quietstar::cuda
