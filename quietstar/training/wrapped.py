"""A model as it is while it is trained: wrapped by DDP, FSDP, DeepSpeed or adapters, its weights perhaps in parts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quietstar.models import QuietStarConfig
from quietstar.ops._dtensor import is_dtensor, is_fsdp_unit

Answer = TypeVar("Answer")


def call_inside(wrapped: nn.Module, model: nn.Module, function: Callable[[], Answer]) -> Answer:
    """What ``function`` returns, called where ``model`` in its wrappers has its forward pass.

    Wrappers have the weights ready there, and nowhere else: methods of a model that FSDP has sharded, called from
    outside, would find only parts of them.
    """
    wrapped = getattr(wrapped, "_orig_mod", wrapped)  # of torch.compile, which would compile the function
    if wrapped is model and not _is_unit(model):
        return function()
    usual = model.__dict__.get("forward")  # that accelerate has put there

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
    """What this process holds of a parameter: all of it, or its part where FSDP or DeepSpeed has sharded it."""
    parameter = getattr(parameter, "ds_tensor", parameter)
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def whole(part: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that lies on processes as ``parameter`` does, put together on all of them."""
    if not is_dtensor(parameter):
        return part
    from torch.distributed.tensor import DTensor

    shape = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, **shape).full_tensor()


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of ``parameter``; all processes have to ask."""
    tensor = tensor.to(parameter.device)
    if not is_dtensor(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements).to_local()


def forget_gathered(model: nn.Module) -> None:
    """Make FSDP gather weights anew, and autocast convert them anew: the parts they are made of have changed."""
    if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
        torch.clear_autocast_cache()
    for module in model.modules():
        if _is_unit(module):
            module.reshard()


def _is_unit(module: nn.Module) -> bool:
    """Of FSDP; nothing is imported where there are no processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and is_fsdp_unit(module)


@contextmanager
def fields(config: QuietStarConfig, **values: Any) -> Iterator[None]:
    """Other values of fields of a configuration, for a while; what contradicts what is not looked at."""
    usual = {name: getattr(config, name) for name in values}
    try:
        for name, value in values.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in usual.items():
            setattr(config, name, value)
