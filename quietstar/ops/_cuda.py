"""Where the kernels of the ``cuda`` backend are launched."""

import torch
from torch import Tensor


def launch_place(tensor: Tensor) -> tuple[int, int]:
    """Number of the tensor's device, and the address of the CUDA stream that is current there."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
