"""The backends of the linear cross-entropies. The device and dtype of ``hidden`` decide which can run.

Each is a module with

    solve_chunk(chunk, d_weight, needs_hidden, needs_weight) -> ChunkResult    (``chunks.ChunkKernel``)
    MixedHidden                                                                (``inputs.MixedHidden``)
    scale_(gradient, factor), in place, if it runs on GPUs                     (``chunks.scale_``)

The reference is called directly, and autograd computes its gradients.
"""

from types import ModuleType

from quietstar.ops._backend import usual_backends


def _triton() -> ModuleType:
    from quietstar.ops.linear_cross_entropy import backend_triton

    return backend_triton


def _cuda() -> ModuleType:
    from quietstar.ops.linear_cross_entropy import backend_cuda

    return backend_cuda


def _cpu() -> ModuleType:
    from quietstar.ops.linear_cross_entropy import backend_cpu

    return backend_cpu


def _torch() -> ModuleType:
    from quietstar.ops.linear_cross_entropy import backend_torch

    return backend_torch


def _reference() -> ModuleType:
    from quietstar.ops.linear_cross_entropy import reference

    return reference


BACKENDS = usual_backends(triton=_triton, cuda=_cuda, cpu=_cpu, torch=_torch, reference=_reference)
