"""Which dtype is computed in: at least float32, of inputs that inside autocast take its dtype."""

import contextlib

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, losses and sums for inputs of ``dtype``: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(tensor: Tensor) -> Tensor:
    """``tensor`` in its ``compute_dtype``."""
    return tensor.to(compute_dtype(tensor.dtype))


def autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for tensors on ``device``; there are devices that have none."""
    return _has_autocast(device.type) and torch.is_autocast_enabled(device.type)


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


_has_autocast._dynamo_marked_constant = True  # as in _availability; torch 2.11 cannot trace the question


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """A region in which tensors on ``device`` are computed with in the dtypes they have."""
    if autocast_on(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def autocast_inputs(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the autocast dtype of their device if autocast is on, else as they are.

    float64 stays, as do integers and None. The first is a tensor; all are on its device.
    """
    device = tensors[0].device
    if not autocast_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(x.to(dtype) if _follows(x) else x for x in tensors)


def _follows(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
