"""Whether the Triton backend of an op can run. Nothing here imports triton: that waits for the first kernel."""

import importlib.util
import os

import torch
from torch import Tensor

from quietstar.ops._capability import too_old

_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device. It is for tests: correct, and very slow."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def triton_unavailable(tensor: Tensor) -> str | None:
    """Why Triton kernels cannot run on ``tensor``, in one clause; None if they can."""
    if not _INSTALLED:
        return "triton is not installed"
    if tensor.dtype == torch.float64:
        return "its kernels compute in float32, which is too little for float64 inputs"
    if interpreted():
        return "Triton's interpreter does not round to bfloat16" if tensor.dtype == torch.bfloat16 else None
    if tensor.device.type != "cuda":
        return f"its kernels need a GPU and the inputs are on {tensor.device.type} (to test them: TRITON_INTERPRET=1)"
    return too_old(tensor.device)
