from types import ModuleType

# Called by quietstar/ops/*/backend_*.py only; the signatures are in csrc/cpu/bindings.cpp and csrc/cuda/bindings.cpp.
cpu: ModuleType
cuda: ModuleType  # only in builds with CUDA

def build_info() -> dict[str, str | None]: ...
