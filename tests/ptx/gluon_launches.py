"""Launches of the kernels in Gluon, for `compile_kernels.compiled`."""

import torch

from ptx import gluon_forward


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def forward(dim: int = 128, registers: int = 240) -> None:
    keys, thoughts = _empty(1, 128, 1, dim), _empty(1, 128, 4, 1, dim)
    gluon_forward.forward(_empty(1, 4, 128, 4, dim), keys, keys, thoughts, thoughts, registers=registers)


def forward_with(registers: int) -> None:
    forward(64, registers)
