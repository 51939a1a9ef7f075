// quietstar._C.cuda: the kernels of the `cuda` backend as Python sees them.

#include "quietstar/bindings.h"

namespace quietstar {

void bind_cuda(pybind11::module_& module) { module.def_submodule("cuda", "Kernels of the cuda backend."); }

}  // namespace quietstar
