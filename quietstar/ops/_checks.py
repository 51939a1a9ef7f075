"""Argument checks shared by all ops. Every message says which argument it is about, what it must be and what it was."""

import os

import torch
from torch import Tensor

from quietstar.ops._dtensor import is_dtensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int32, torch.int64)

# Reading a value on CUDA waits for the device, so values are read there only if this variable is set (for debugging).
CHECK_VALUES_VARIABLE = "QUIETSTAR_CHECK_VALUES"
_OFF = ("", "0", "false", "no", "off")


class Dims:
    """Sizes shared between arguments; each letter is bound by the first tensor that has it.

    >>> dims = Dims()
    >>> dims.bind("key", key, "B Hkv L D")
    >>> dims.bind("value", value, "B Hkv L D")   # ValueError if it disagrees, naming the letter
    >>> dims["L"]
    """

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._origin: dict[str, str] = {}

    def __getitem__(self, letter: str) -> int:
        return self._sizes[letter]

    def bind(self, name: str, tensor: Tensor, *specs: str) -> None:
        """Require the shape to match one of ``specs``, which differ in their number of letters."""
        check_tensor(name, tensor)
        shapes = [spec.split() for spec in specs]
        wanted = " or ".join(f"[{', '.join(letters)}]" for letters in shapes)
        letters = next((letters for letters in shapes if len(letters) == tensor.dim()), None)
        if letters is None:
            raise ValueError(f"{name} must have shape {wanted}, got {tensor.dim()} dimensions: {list(tensor.shape)}")
        for letter, size in zip(letters, tensor.shape, strict=True):
            if letter not in self._sizes:
                self._sizes[letter], self._origin[letter] = size, name
            elif self._sizes[letter] != size:
                raise ValueError(
                    f"{name} must have shape {wanted} with {letter} = {self._sizes[letter]} "
                    f"as in {self._origin[letter]}, got {list(tensor.shape)}"
                )


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if is_dtensor(value):
        raise TypeError(f"{name} must be a torch.Tensor of this process alone (see to_local), got a DTensor")


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_integer(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in INTEGER:
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")


def check_same_dtype(**tensors: Tensor) -> None:
    """Require all tensors to have the dtype of the first."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != reference.dtype:
            raise TypeError(f"{name} must have the dtype of {first}, {reference.dtype}, got {tensor.dtype}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Require all tensors to be on the device of the first. None is skipped."""
    (first, reference), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.device != reference.device:
            raise ValueError(f"{name} must be on the device of {first}, {reference.device}, got {tensor.device}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def can_read_values(tensor: Tensor) -> bool:
    """Whether a check may read the values: on the CPU, or on any device if ``QUIETSTAR_CHECK_VALUES`` is set.

    Never inside ``torch.compile``, where values do not exist yet.
    """
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get(CHECK_VALUES_VARIABLE, "").strip().lower() not in _OFF


def check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Require all values to be in [low, high]; skipped where values cannot be read (``can_read_values``)."""
    if tensor.numel() == 0 or not can_read_values(tensor):
        return
    smallest, largest = (int(x) for x in torch.aminmax(tensor))
    if smallest < low or largest > high:
        raise ValueError(f"{name} must be in [{low}, {high}], got values from {smallest} to {largest}")
