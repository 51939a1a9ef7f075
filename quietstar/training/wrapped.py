"""Access to a model during training, when DDP, FSDP, DeepSpeed or adapters wrap it and may shard its weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quietstar.models import QuietStarConfig
from quietstar.ops._dtensor import is_dtensor, is_fsdp_unit

Answer = TypeVar("Answer")


def call_inside(wrapped: nn.Module, model: nn.Module, function: Callable[[], Answer]) -> Answer:
    """Call ``function`` in place of ``model``'s forward pass inside its wrappers, and return its result.

    Only there do wrappers make the weights available. Methods of a model sharded by FSDP, called from outside, would
    find only parts of them.
    """
    wrapped = getattr(wrapped, "_orig_mod", wrapped)  # unwrap torch.compile, which would compile the function
    if wrapped is model and not _is_unit(model):
        return function()
    usual = model.__dict__.get("forward")  # set by accelerate

    def restore() -> None:
        if usual is not None:
            model.forward = usual
        else:
            model.__dict__.pop("forward", None)

    def instead(*_, **__) -> Answer:
        restore()
        return function()

    model.forward = instead
    try:
        return wrapped()
    finally:
        restore()


def part_here(parameter: Tensor) -> Tensor:
    """Return this process's part of a parameter: all of it unless FSDP or DeepSpeed has sharded it."""
    parameter = getattr(parameter, "ds_tensor", parameter)
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def whole(part: Tensor, parameter: Tensor) -> Tensor:
    """Gather on all processes a tensor that is sharded like ``parameter``."""
    if not is_dtensor(parameter):
        return part
    from torch.distributed.tensor import DTensor

    shape = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, **shape).full_tensor()


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, sharded like ``parameter``; all processes must call this."""
    tensor = tensor.to(parameter.device)
    if not is_dtensor(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements).to_local()


def forget_gathered(model: nn.Module) -> None:
    """Make FSDP gather weights again, and autocast convert them again, because their parts have changed."""
    if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
        torch.clear_autocast_cache()
    for module in model.modules():
        if _is_unit(module):
            module.reshard()


def _is_unit(module: nn.Module) -> bool:
    """Whether a module is an FSDP unit; without a process group, nothing is imported."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and is_fsdp_unit(module)


@contextmanager
def fields(config: QuietStarConfig, **values: Any) -> Iterator[None]:
    """Set fields of a configuration to other values inside the context, without checking for contradictions."""
    usual = {name: getattr(config, name) for name in values}
    try:
        for name, value in values.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in usual.items():
            setattr(config, name, value)
