// Starts the row kernel of the linear cross-entropies.

#include "quietstar/linear_cross_entropy.cuh"

namespace quietstar::cuda {

void cross_entropy_rows(DType gradient_dtype, const CrossEntropyRows& arguments, const Launch& where) {
  const bool with_more = arguments.softcap != 0 || arguments.entropy || arguments.entropy_scale;
  const std::int64_t of_a_warp = kWarpSize * kRowWidth * (with_more ? kRowVectors<true> : kRowVectors<false>);
  const std::int64_t warps =
      min((arguments.vocabulary + of_a_warp - 1) / of_a_warp, std::int64_t{kRowMostThreads / kWarpSize});
  const bool aligned = misalignment(arguments.logits) == 0 && arguments.stride % kRowWidth == 0;
  with_dtype(gradient_dtype, [&](auto example) {
    using G = decltype(example);
    const auto plain = aligned ? cross_entropy_row_kernel<G, true, false> : cross_entropy_row_kernel<G, false, false>;
    const auto more = aligned ? cross_entropy_row_kernel<G, true, true> : cross_entropy_row_kernel<G, false, true>;
    launch(with_more ? more : plain, arguments.rows, static_cast<int>(warps * kWarpSize), 0, where, arguments);
  });
}

}  // namespace quietstar::cuda
