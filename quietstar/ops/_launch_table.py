"""Lookup in tables of launch parameters, shared by all kernels.

A table's key is a kernel's name, an architecture, and whatever else its rows depend on. Nothing is tuned while a
program runs: ``python -m quietstar.ops.tune`` times candidates on the current GPU and prints rows for the tables.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
import triton
from torch import Tensor

from quietstar.ops._availability import interpreted

HOPPER, BLACKWELL, AMPERE, COMPACT, INTERPRETER = "hopper", "blackwell", "ampere", "compact", "interpreter"
# The key of rows for all architectures that have no row of their own.
ANY = "any"

Row = TypeVar("Row")


def architecture() -> str:
    """Return the architecture of the current device, a key of the tables."""
    if interpreted():
        return INTERPRETER
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return COMPACT
    return {80: AMPERE, 87: AMPERE, 90: HOPPER, 100: BLACKWELL, 103: BLACKWELL}.get(target.arch, COMPACT)


def row_key(kernel: str, tensor: Tensor, *more: int) -> tuple[str | int, ...]:
    """Return the key of a kernel's row for the device of ``tensor``."""
    with torch.cuda.device_of(tensor):
        return kernel, architecture(), *more


def row_for(table: Mapping[tuple, Row], kernel: str, tensor: Tensor, *more: int) -> Row:
    """Return a kernel's row for the device of ``tensor``."""
    key = row_key(kernel, tensor, *more)
    return table.get(key) or table[kernel, ANY, *more]
