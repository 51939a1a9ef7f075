// The kernels of the cuda backend and their bindings, as a module that runs them on the CPU, under simt.h.

#include "quietstar/bindings.h"
#include "quietstar/device.cuh"

namespace {

void one_lane_waits_elsewhere() {
  if (threadIdx.x == 0) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

void lanes_in_different_operations() {
  if (threadIdx.x % 2) {
    __syncwarp();
  } else {
    __ballot_sync(0xFFFFFFFFu, true);
  }
}

void half_a_warp() { __syncwarp(0xFFFFu); }

}  // namespace

PYBIND11_MODULE(simt_module, module) {
  quietstar::bind_cuda(module);
  module.def(
      "set_random_seed", [](std::uint32_t seed) { simt::random_seed = seed; },
      "Chooses another order in which threads and blocks run.");
  module.def("set_fault", [](const std::string& fault) { simt::fault = fault; }, "See simt.h.");
  const auto run = [](void (*kernel)()) {
    return [kernel] { quietstar::cuda::launch(kernel, 2, 64, 0, {0, nullptr}); };
  };
  module.def("one_lane_waits_elsewhere", run(one_lane_waits_elsewhere));
  module.def("lanes_in_different_operations", run(lanes_in_different_operations));
  module.def("half_a_warp", run(half_a_warp));
}
