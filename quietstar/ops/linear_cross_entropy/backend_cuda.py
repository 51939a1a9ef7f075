"""The row kernel of the ``cuda`` backend, which reads the chunk of logits once and writes it once."""

import torch
from torch import Tensor

from quietstar.ops._native import _C, DTYPE_CODES, address, launch_place
from quietstar.ops._vocabulary import Softmax
from quietstar.ops.linear_cross_entropy.chunks import chunk_solver, scale_
from quietstar.ops.linear_cross_entropy.inputs import MixedHidden, RowResult, Scales

__all__ = ["MixedHidden", "scale_", "solve_chunk"]


def cross_entropy_rows(
    logits: Tensor,
    softmax: Softmax,
    target: Tensor,
    scales: Scales | None,
    entropy: bool,
    gradient_dtype: torch.dtype,
) -> RowResult:
    """Compute nll and entropy of every row and overwrite its logits with their gradient: see ``.chunks.RowKernel``."""
    rows, vocabulary = logits.shape
    if softmax.suppress is not None:
        logits.index_fill_(1, softmax.suppress, float("-inf"))
    nll, entropies = logits.new_empty(rows), logits.new_empty(rows) if entropy else None
    target = target.contiguous()
    nll_scale, entropy_scale = (None, None) if scales is None else scales.each(Tensor.contiguous)
    _C.cuda.cross_entropy_rows(
        DTYPE_CODES[gradient_dtype], address(logits), logits.stride(0), address(target), address(nll_scale),
        address(entropy_scale), address(nll), address(entropies), 1 / softmax.temperature, softmax.softcap or 0.0,
        rows, vocabulary, *launch_place(logits),
    )  # fmt: skip
    gradient = None if scales is None else logits.view(gradient_dtype)[:, :vocabulary]
    return RowResult(nll, entropies, gradient)


solve_chunk = chunk_solver(cross_entropy_rows)
