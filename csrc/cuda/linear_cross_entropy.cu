// Starts the row kernel of the linear cross-entropies.

#include "quietstar/linear_cross_entropy.cuh"

namespace quietstar::cuda {

void cross_entropy_rows(DType gradient_dtype, const CrossEntropyRows& arguments, const Launch& where) {
  const std::int64_t of_a_warp = kWarpSize * kRowVectors * kRowWidth;
  const std::int64_t warps = (min(arguments.vocabulary, kRowMostLogits) + of_a_warp - 1) / of_a_warp;
  const bool aligned = misalignment(arguments.logits) == 0 && arguments.stride % kRowWidth == 0;
  with_dtype(gradient_dtype, [&](auto example) {
    using G = decltype(example);
    const auto kernel = aligned ? cross_entropy_row_kernel<G, true> : cross_entropy_row_kernel<G, false>;
    launch(kernel, arguments.rows, static_cast<int>(warps * kWarpSize), 0, where, arguments);
  });
}

}  // namespace quietstar::cuda
