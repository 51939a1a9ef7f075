"""Weights that are distributed over several processes: sharded by FSDP or tensor parallelism, or replicated."""

import torch
from torch import Tensor


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor. Without a process group there are none, and nothing is imported."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def is_fsdp_unit(module: torch.nn.Module) -> bool:
    """Whether FSDP gathers the module's weights when the module is called."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def gathered(name: str, weight: Tensor) -> Tensor:
    """Gather a DTensor weight on every process, as calling its layer would; return other tensors unchanged.

    The gradient is distributed like the weight. It is the mean over processes of the gradients from their rows, as in
    FSDP, and in tensor parallelism if all processes have the same rows.
    """
    if not is_dtensor(weight):
        return weight
    if any(placement.is_partial() for placement in weight.placements):
        raise ValueError(f"{name} must be sharded or replicated, got the placements {weight.placements}")
    return _Gathered.apply(weight)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.mesh, ctx.placements = weight.device_mesh, weight.placements
        return weight.full_tensor()

    @staticmethod
    def backward(ctx, grad):
        from torch.distributed.tensor import DTensor, Partial

        summands = DTensor.from_local(grad / ctx.mesh.size(), ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return summands.redistribute(placements=ctx.placements)
