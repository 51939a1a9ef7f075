// The kernels of the cuda backend and their bindings, as a module that runs them on the CPU, under simt.h.

#include <pybind11/functional.h>
#include <pybind11/stl.h>

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
  module.def(
      "set_launcher",
      [](const std::optional<pybind11::function>& run) {
        simt::launcher = nullptr;
        if (!run) return;
        simt::launcher = [run = *run](const char* kernel, std::int64_t blocks, int threads, std::size_t shared_bytes,
                                      const void* parameter, std::size_t bytes) {
          pybind11::gil_scoped_acquire python;
          run(kernel, blocks, threads, shared_bytes, pybind11::bytes(static_cast<const char*>(parameter), bytes));
        };
      },
      "Hands kernels over instead of running them, by the name they have in PTX; None ends that.");
  module.def("set_fault", [](const std::string& fault) { simt::fault = fault; }, "See simt.h.");
  const auto run = [](void (*kernel)()) {
    return [kernel] { quietstar::cuda::launch(kernel, 2, 64, 0, {0, nullptr}); };
  };
  module.def("one_lane_waits_elsewhere", run(one_lane_waits_elsewhere));
  module.def("lanes_in_different_operations", run(lanes_in_different_operations));
  module.def("half_a_warp", run(half_a_warp));
}
