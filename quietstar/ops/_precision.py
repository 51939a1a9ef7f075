"""The dtypes that ops compute in: float32 or wider, on inputs that inside autocast are cast to the autocast dtype."""

import contextlib

import torch
from torch import Tensor

from quietstar.ops._compiled import constant_when_compiled


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, losses and sums for inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(tensor: Tensor) -> Tensor:
    """Convert ``tensor`` to its ``compute_dtype``."""
    return tensor.to(compute_dtype(tensor.dtype))


def autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for tensors on ``device``; False for devices without autocast."""
    return _has_autocast(device.type) and torch.is_autocast_enabled(device.type)


@constant_when_compiled  # torch 2.11 cannot trace it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context manager that turns autocast off for tensors on ``device``."""
    if autocast_on(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def autocast_inputs(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast the tensors to the autocast dtype of their device if autocast is on, else return them unchanged.

    float64 tensors, integers and None are never changed. The first argument is a tensor, and all are on its device.
    """
    device = tensors[0].device
    if not autocast_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(x.to(dtype) if _follows(x) else x for x in tensors)


def _follows(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
