// quietstar._C: the compiled part of quietstar as Python sees it.
//
// It links no torch library, so that one build serves every torch version.

#include "quietstar/bindings.h"

#include <pybind11/pybind11.h>

#include <string>
#ifdef QUIETSTAR_CUDA
#include "quietstar/cuda_build.h"
#endif

namespace py = pybind11;

namespace {

// What this module was really built with: each entry comes from the compilation of the part it speaks of.
py::dict build_info() {
  py::dict info;
  info["compiler"] = QUIETSTAR_COMPILER;
  info["cxx_standard"] = "C++" + std::to_string(__cplusplus / 100 % 100);
#ifdef _OPENMP
  info["openmp"] = QUIETSTAR_OPENMP_VERSION;
#else
  info["openmp"] = py::none();
#endif
#ifdef QUIETSTAR_CUDA
  info["cuda"] = quietstar::cuda_version();
  info["cuda_architectures"] = quietstar::cuda_architectures();
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled part of quietstar. Reached through the checked functions of the package only.";
  module.def("build_info", &build_info,
             "Compiler, C++ standard, OpenMP version, CUDA version and architectures of this build, as text; None "
             "where a part was not built.");
  quietstar::bind_cpu(module);
#ifdef QUIETSTAR_CUDA
  quietstar::bind_cuda(module);
#endif
}
