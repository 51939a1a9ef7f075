"""Row kernel of the ``cuda`` backend: the chunk is read from memory once and written once."""

import torch
from torch import Tensor

from quietstar.ops._cuda import launch_place
from quietstar.ops._native import _C, DTYPE_CODES, address


def cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    temperature: float,
    suppress: Tensor | None,
    gradient_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Nll of every row and, over the logits, its gradient: see :class:`.matmuls.RowKernel`."""
    rows, vocabulary = logits.shape
    if suppress is not None:
        logits.index_fill_(1, suppress, float("-inf"))
    nll = logits.new_empty(rows)
    target, scale = target.contiguous(), None if scale is None else scale.contiguous()
    _C.cuda.cross_entropy_rows(
        DTYPE_CODES[gradient_dtype], address(logits), logits.stride(0), address(target), address(scale), address(nll),
        1 / temperature, rows, vocabulary, *launch_place(logits),
    )  # fmt: skip
    return nll, None if scale is None else logits.view(gradient_dtype)[:, :vocabulary]
