"""The backends of sampling. The device and dtype of ``hidden`` decide which can run.

Each is a module with

    sample(hidden, weight, sampling) -> tokens, int64 [rows]; ``inputs.NO_TOKEN`` where none can be drawn
"""

from types import ModuleType

from quietstar.ops._backend import usual_backends


def _triton() -> ModuleType:
    from quietstar.ops.linear_sample import backend_triton

    return backend_triton


def _cuda() -> ModuleType:
    from quietstar.ops.linear_sample import backend_cuda

    return backend_cuda


def _cpu() -> ModuleType:
    from quietstar.ops.linear_sample import backend_cpu

    return backend_cpu


def _torch() -> ModuleType:
    from quietstar.ops.linear_sample import backend_torch

    return backend_torch


def _reference() -> ModuleType:
    from quietstar.ops.linear_sample import reference

    return reference


BACKENDS = usual_backends(triton=_triton, cuda=_cuda, cpu=_cpu, torch=_torch, reference=_reference)
