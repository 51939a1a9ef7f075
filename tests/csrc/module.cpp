// The kernels of the cuda backend and their bindings, as a module that runs them on the CPU, under simt.h.

#include "quietstar/bindings.h"
#include "quietstar/device.cuh"

PYBIND11_MODULE(simt_module, module) {
  quietstar::bind_cuda(module);
  module.def("set_random_seed", [](std::uint32_t seed) { simt::random_seed = seed; },
             "Chooses another order in which threads and blocks run.");
}
