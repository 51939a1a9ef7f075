// quietstar._C.cpu: the kernels of the `cpu` backend as Python sees them.

#include "quietstar/bindings.h"

namespace quietstar {

void bind_cpu(pybind11::module_& module) { module.def_submodule("cpu", "Kernels of the cpu backend."); }

}  // namespace quietstar
