"""The compiled module ``quietstar._C``: whether it is available, how tensors are passed to it, and where it runs.

Its functions take addresses, sizes and strides as plain integers and do not depend on torch, so one build works with
every version of torch. Their meaning is checked here and in the ops; the functions themselves only reject null,
negative and misaligned values.
"""

import functools

import torch
from torch import Tensor

from quietstar.ops._availability import not_built_for, too_old

try:  # after torch: the module then shares torch's OpenMP threads instead of starting its own
    from quietstar import _C
except ImportError as error:
    _C, _MISSING = None, f"the compiled module is missing ({error}); `pip install .` builds it with GCC or Clang"

# Evaluated once here: torch.compile traces the choice of a backend and cannot trace into the compiled module.
_BUILD = {} if _C is None else _C.build_info()
# The architectures that CUDA code was compiled for, in CMake's notation; empty in builds without CUDA.
_ARCHITECTURES = tuple((_BUILD.get("cuda_architectures") or "").split())

# The codes of csrc/include/quietstar/contract.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def cpu_unavailable(tensor: Tensor) -> str | None:
    """Return why the ``cpu`` backend cannot run on ``tensor``, in one clause; None if it can."""
    if _C is None:
        return _MISSING
    if tensor.device.type != "cpu":
        return f"its kernels need tensors on the CPU, got {tensor.device.type}"
    return _unless_dtype(tensor, torch.float32, torch.bfloat16)


def cuda_unavailable(tensor: Tensor) -> str | None:
    """Return why the ``cuda`` backend cannot run on ``tensor``, in one clause; None if it can."""
    if _C is None:
        return _MISSING
    if not _ARCHITECTURES:
        return "the compiled module was built without CUDA; `pip install . -C cmake.define.QUIETSTAR_CUDA=ON` adds it"
    if tensor.device.type != "cuda":
        return f"its kernels need tensors on a GPU, got {tensor.device.type}"
    if torch.version.hip:
        return "its kernels are for GPUs of NVIDIA, and this PyTorch is for AMD's"
    return (
        _unless_dtype(tensor, torch.float32, torch.bfloat16, torch.float16)
        or too_old(tensor.device)
        or not_built_for(tensor.device, _ARCHITECTURES)
    )


def _unless_dtype(tensor: Tensor, *dtypes: torch.dtype) -> str | None:
    if tensor.dtype in dtypes:
        return None
    return f"its kernels take {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, got {tensor.dtype}"


def address(tensor: Tensor | None) -> int:
    """Return the address of the tensor's elements; 0 if the tensor is None."""
    return 0 if tensor is None else tensor.data_ptr()


def unit_columns(tensor: Tensor) -> Tensor:
    """Return ``tensor`` [..., n] with unit stride in the last dimension, copied only if necessary."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def as_rows(tensor: Tensor) -> Tensor:
    """Return ``tensor`` [..., n] as [rows, n] with unit stride in each row, copied only if necessary."""
    return unit_columns(tensor.reshape(-1, tensor.shape[-1]))


def launch_place(tensor: Tensor) -> tuple[int, int]:
    """Return the index of the tensor's device, and the address of its current CUDA stream."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
