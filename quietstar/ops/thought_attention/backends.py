"""The backends of thought attention, and when each can run.

Each is a module with

    forward(inputs, mask) -> Result
    backward(gradients, inputs, mask, result) -> Inputs

with the types of ``inputs.py``; no size is 0. A backward accepts the result of any backend's forward: ``cuda`` has no
backward, so another backend's runs in its place. The reference is called directly, and autograd computes its gradients.
"""

from types import ModuleType

from quietstar.ops._availability import triton_unavailable
from quietstar.ops._backend import Backend, always_available
from quietstar.ops._native import cpu_unavailable, cuda_unavailable
from quietstar.ops.thought_attention.inputs import Inputs, Mask


def _triton() -> ModuleType:
    from quietstar.ops.thought_attention import backend_triton

    return backend_triton


def _triton_unavailable(inputs: Inputs, mask: Mask) -> str | None:
    return _head_too_large(inputs, 256) or triton_unavailable(inputs.query)


def _cuda() -> ModuleType:
    from quietstar.ops.thought_attention import backend_cuda

    return backend_cuda


def _cuda_unavailable(inputs: Inputs, mask: Mask) -> str | None:
    return _head_too_large(inputs, 128) or cuda_unavailable(inputs.query)


def _cpu() -> ModuleType:
    from quietstar.ops.thought_attention import backend_cpu

    return backend_cpu


def _cpu_unavailable(inputs: Inputs, mask: Mask) -> str | None:
    return cpu_unavailable(inputs.query)


def _torch() -> ModuleType:
    from quietstar.ops.thought_attention import backend_torch

    return backend_torch


def _reference() -> ModuleType:
    from quietstar.ops.thought_attention import reference

    return reference


def _head_too_large(inputs: Inputs, largest: int) -> str | None:
    for name, tensor in (("D", inputs.query), ("Dv", inputs.value)):
        if tensor.shape[-1] > largest:
            return f"its kernels take heads of at most {largest} elements, got {name} = {tensor.shape[-1]}"
    return None


# In order of preference.
BACKENDS: dict[str, Backend] = {
    "triton": Backend(_triton_unavailable, _triton),
    "cuda": Backend(_cuda_unavailable, _cuda),
    "cpu": Backend(_cpu_unavailable, _cpu),
    "torch": Backend(always_available, _torch),
    "reference": Backend(always_available, _reference),
}
BACKWARDS = {name: BACKENDS[name] for name in ("triton", "cpu", "torch")}
