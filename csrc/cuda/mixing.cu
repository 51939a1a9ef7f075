// Starts the kernels of mix_logits and mixed_cross_entropy.

#include "quietstar/mixing.cuh"

namespace quietstar::cuda {

void mix(DType dtype, const MixForward& arguments, const Launch& where) {
  with_dtype(dtype, [&](auto example) {
    launch(mix_kernel<decltype(example)>, arguments.mix.rows, kMixThreads, 0, where, arguments);
  });
}

void mix_backward(DType dtype, const MixBackward& arguments, const Launch& where) {
  with_dtype(dtype, [&](auto example) {
    using T = decltype(example);
    const auto kernel = arguments.d_weight ? mix_backward_kernel<T, true> : mix_backward_kernel<T, false>;
    launch(kernel, arguments.mix.rows, kMixThreads, 0, where, arguments);
  });
}

void mixed_cross_entropy(DType dtype, const MixedCrossEntropy& arguments, const Launch& where) {
  with_dtype(dtype, [&](auto example) {
    launch(mixed_cross_entropy_kernel<decltype(example)>, arguments.mix.rows, kMixThreads, 0, where, arguments);
  });
}

void mixed_cross_entropy_backward(DType dtype, const MixedCrossEntropyBackward& arguments, const Launch& where) {
  with_dtype(dtype, [&](auto example) {
    launch(mixed_cross_entropy_backward_kernel<decltype(example)>, arguments.mix.rows, kMixThreads, 0, where,
           arguments);
  });
}

}  // namespace quietstar::cuda
