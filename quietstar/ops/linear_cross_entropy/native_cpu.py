"""Row kernel of the ``cpu`` backend: the chunk is read from memory once and written once."""

import torch
from torch import Tensor

from quietstar.ops._native import _C, address


def cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    temperature: float,
    suppress: Tensor | None,
    gradient_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Nll of every row and, over the logits, its gradient: see :class:`.chunks.RowKernel`."""
    rows, vocabulary = logits.shape
    nll = logits.new_empty(rows)
    target, scale, suppress = (None if x is None else x.contiguous() for x in (target, scale, suppress))
    _C.cpu.cross_entropy_rows(
        address(logits), logits.stride(0), address(target), address(scale), address(nll), address(suppress),
        0 if suppress is None else len(suppress), temperature, rows, vocabulary, torch.get_num_threads(),
    )  # fmt: skip
    return nll, None if scale is None else logits.to(gradient_dtype)
