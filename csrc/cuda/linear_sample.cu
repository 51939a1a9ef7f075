// Starts the row kernel of sampling.

#include "quietstar/linear_sample.cuh"

namespace quietstar::cuda {

void sample_rows(const SampleRows& arguments, const Launch& where) {
  const bool filtered = arguments.top_k != 0 || arguments.top_p < 1;
  const auto kernel = arguments.softcap != 0 ? (filtered ? sample_kernel<true, true> : sample_kernel<false, true>)
                                             : (filtered ? sample_kernel<true, false> : sample_kernel<false, false>);
  launch(kernel, arguments.rows, kSampleThreads,
         static_cast<std::size_t>(arguments.groups + arguments.groups % 2) * sizeof(float), where, arguments);
}

}  // namespace quietstar::cuda
