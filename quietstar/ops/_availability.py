"""Whether Triton kernels can run here at all, and on which GPUs, by compute capability, compiled code can run.

Nothing here imports triton; this is postponed until a kernel is first needed.
"""

import functools
import importlib.util
import os
import re

import torch
from torch import Tensor

from quietstar.ops._compiled import constant_when_compiled

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

Capability = tuple[int, int]
"""Major and minor number, as PyTorch reports them."""

# The oldest that Triton supports; csrc/cuda needs it too, for bfloat16 products (m16n8k16) and cp.async.
_LEAST = 8, 0
# GPUs on one chip with a CPU. Their machine code runs neither on others of their generation nor on each other.
_INTEGRATED = {(8, 7), (10, 1), (11, 0)}


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device: correct but very slow, meant for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def triton_unavailable(tensor: Tensor) -> str | None:
    """Return why Triton kernels cannot run on ``tensor``, in one clause; None if they can."""
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if tensor.dtype == torch.float64:
        return "its kernels compute in float32, which is too little for float64 inputs"
    if interpreted():
        return "Triton's interpreter does not round to bfloat16" if tensor.dtype == torch.bfloat16 else None
    if tensor.device.type != "cuda":
        return f"its kernels need a GPU and the inputs are on {tensor.device.type} (to test them: TRITON_INTERPRET=1)"
    return too_old(tensor.device)


@constant_when_compiled
def too_old(device: torch.device) -> str | None:
    """Return why kernels cannot run on this GPU, in one clause; None if they can, or if its capability is unknown.

    Also None for AMD GPUs, whose capability numbers mean something else.
    """
    found = None if torch.version.hip else capability(device)
    if found is None or found >= _LEAST:
        return None
    return f"needs compute capability {_dotted(_LEAST)} or newer, got {_dotted(found)} on {device}"


@constant_when_compiled
def not_built_for(device: torch.device, architectures: tuple[str, ...]) -> str | None:
    """Return why kernels compiled for ``architectures`` cannot run on this GPU; see ``too_old``."""
    found = capability(device)
    if found is None or runs_on(architectures, found):
        return None
    return (
        f"the compiled module was built for {' '.join(architectures)}, and {device} has compute capability "
        f"{_dotted(found)}; `pip install . -C cmake.define.CMAKE_CUDA_ARCHITECTURES={found[0]}{found[1]}-real` "
        "builds it for that (so does the environment variable CUDAARCHS)"
    )


def capability(device: torch.device) -> Capability | None:
    """Return the compute capability of a device; None if the device, that of a fake tensor, does not exist here."""
    try:
        return torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError):  # PyTorch without CUDA, no driver, no such device
        return None


@functools.cache
def runs_on(architectures: tuple[str, ...], capability: Capability) -> bool:
    """Whether code for ``architectures``, in the notation of CMAKE_CUDA_ARCHITECTURES, runs on a capability.

    - ``80-real``: machine code, runs on the same major number with an equal or larger minor number;
    - ``80-virtual``: PTX, which the driver compiles for any equal or newer capability;
    - ``80``: both;
    - ``90a...``: uses features of one architecture, runs only on that one;
    - ``100f...``: uses features of a family, runs where machine code would.
    """
    return any(_runs(architecture, capability) for architecture in architectures)


def _runs(architecture: str, capability: Capability) -> bool:
    match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    if match is None:
        return False
    major, minor, features, kind = match.groups()
    built = int(major), int(minor)
    if built == capability:
        return True
    if features == "a":
        return False
    if kind != "-real" and not features:
        return capability > built
    return capability[0] == built[0] and capability[1] > built[1] and not {built, capability} & _INTEGRATED


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))
