"""Where the kernels of the ``cuda`` backend are launched."""

import functools

import torch
from torch import Tensor


def launch_place(tensor: Tensor) -> tuple[int, int]:
    """Number of the tensor's device, and the address of the CUDA stream that is current there."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count
