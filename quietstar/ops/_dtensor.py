"""Weights that lie in parts on several processes: sharded by FSDP or tensor parallelism, or replicated."""

import torch
from torch import Tensor


def is_dtensor(value: object) -> bool:
    """Whether it is a tensor of several processes; there is none, and nothing to import, before they have a group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def is_fsdp_unit(module: torch.nn.Module) -> bool:
    """Whether FSDP gathers the weights of the module when it is called."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def gathered(name: str, weight: Tensor) -> Tensor:
    """The whole of the weight on every process, as the layer that it is of would gather it; others as they are.

    Its gradient goes back to where the weight lies, as the mean over processes of what each has made of its rows: what
    FSDP does, and tensor parallelism where all have the same rows.
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
