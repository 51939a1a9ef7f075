"""Autocast for ops: inside ``torch.autocast`` floating inputs take the autocast dtype, as for PyTorch's own matmul."""

import torch
from torch import Tensor


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype of their device if autocast is on, else as they are. float64 stays."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in tensors)
