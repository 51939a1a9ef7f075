// Starts the kernels of thought attention.

#include "quietstar/thought_attention.cuh"
#include "quietstar/thought_attention_float.cuh"

namespace quietstar::cuda {
namespace {

bool in_pieces(const Steps& tensor) {
  return misalignment(static_cast<const char*>(tensor.data)) == 0 && tensor.batch_stride % 8 == 0 &&
         tensor.head_stride % 8 == 0 && tensor.anchor_stride % 8 == 0 && tensor.step_stride % 8 == 0;
}

template <class T, int kHead>
void launch_half(const ThoughtAttention& a, const Launch& where) {
  const bool aligned = a.head_size % 8 == 0 && a.value_size % 8 == 0 && in_pieces(a.query) && in_pieces(a.key) &&
                       in_pieces(a.value) && in_pieces(a.thought_key) && in_pieces(a.thought_value);
  const std::int64_t rows = a.anchors_per_batch * a.steps * (a.query_heads / a.kv_heads);
  int warps = 1;
  while (warps < kMostTileWarps && warps * kRowsOfWarp < rows) warps *= 2;
  const std::int64_t row_blocks = (rows + warps * kRowsOfWarp - 1) / (warps * kRowsOfWarp);
  launch(aligned ? half_attention_kernel<T, kHead, true> : half_attention_kernel<T, kHead, false>,
         a.batch * a.kv_heads * a.splits * row_blocks, warps * kWarpSize, HalfAttention<T, kHead, true>::kSharedBytes,
         where, a);
}

}  // namespace

void thought_attention(DType dtype, const ThoughtAttention& a, const Launch& where) {
  with_dtype(dtype, [&](auto example) {
    using T = decltype(example);
    if constexpr (std::is_same_v<T, float>) {
      const std::int64_t rows = a.anchors_per_batch * a.steps * (a.query_heads / a.kv_heads);
      launch(float_attention_kernel, a.batch * a.kv_heads * a.splits * ((rows + kFloatWarps - 1) / kFloatWarps),
             kFloatWarps * kWarpSize, 0, where, a);
    } else if (a.head_size <= 64 && a.value_size <= 64) {
      launch_half<T, 64>(a, where);
    } else {
      launch_half<T, 128>(a, where);
    }
    if (a.splits > 1) {
      const std::int64_t rows = a.batch * a.query_heads * a.anchors_per_batch * a.steps;
      launch(combine_kernel<T>, (rows + kCombineWarps - 1) / kCombineWarps, kCombineWarps * kWarpSize, 0, where, a);
    }
  });
}

}  // namespace quietstar::cuda
