// The parts of quietstar._C: each makes its own submodule.
#pragma once

#include <pybind11/pybind11.h>

namespace quietstar {

// _C.cpu, defined in csrc/cpu/bindings.cpp.
void bind_cpu(pybind11::module_& module);

// _C.cuda, defined in csrc/cuda/bindings.cpp; only in builds with CUDA.
void bind_cuda(pybind11::module_& module);

}  // namespace quietstar
