"""When the kernels in Gluon run, and the tensor maps by which the TMA unit reads for them.

They are for Hopper, in half precision, with a Triton that has what they are written in. Everything else, and what this
file gives a reason for, is for the kernels of ``triton_forward`` and its neighbours.
"""

import functools

import torch
import triton
from torch import Tensor

from quietstar.ops._availability import interpreted
from quietstar.ops.thought_attention import triton_launch as launch
from quietstar.ops.thought_attention.inputs import Inputs, Mask

_LEAST_TRITON = 3, 8
_LARGEST_HEAD = 128
# Of addresses, and of the distances of what is not side by side.
_TMA_BYTES = 16


def unavailable(inputs: Inputs, mask: Mask) -> str | None:
    """Why the kernels in Gluon cannot run, in one clause; None if they can."""
    query = inputs.query
    with torch.cuda.device_of(query):
        reason = _unavailable_here()
    if reason is not None:
        return reason
    if query.element_size() != 2:
        return f"needs bfloat16 or float16, got {query.dtype}"
    for name, tensor in (("D", query), ("Dv", inputs.value)):
        size = tensor.shape[-1]
        if size % 8 or size > _LARGEST_HEAD:
            return f"needs heads of a multiple of 8 elements, at most {_LARGEST_HEAD}, got {name} = {size}"
    for name, tensor in zip(inputs._fields, inputs, strict=True):
        if name != "query" and not _readable_by_tma(tensor):
            return f"needs vectors of {name} {_TMA_BYTES} bytes, or a multiple, apart, got strides {tensor.stride()}"
    return None


def _unavailable_here() -> str | None:
    """The same for everything, on the current device."""
    if interpreted():
        return "is not for Triton's interpreter"
    if launch.architecture() != launch.HOPPER:
        return "needs a GPU of compute capability 9.0"
    return _triton_too_old()


@functools.cache
def _triton_too_old() -> str | None:
    if tuple(map(int, triton.__version__.split(".")[:2])) >= _LEAST_TRITON:
        return None
    return f"needs Triton >= {'.'.join(map(str, _LEAST_TRITON))}, found {triton.__version__}"


def _readable_by_tma(tensor: Tensor) -> bool:
    """Whether there is a tensor map of it: strides of dimensions of size 1 say nothing, and 0 is none."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    bytes_apart = [stride * tensor.element_size() for stride in strides[:-1]]
    return (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % _TMA_BYTES == 0
        and all(apart > 0 and apart % _TMA_BYTES == 0 for apart in bytes_apart)
    )
