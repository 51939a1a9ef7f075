"""Autocast for ops: inside ``torch.autocast`` floating inputs take the autocast dtype, as for PyTorch's own matmul."""

import torch
from torch import Tensor

from quietstar.ops._precision import autocast_on


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
