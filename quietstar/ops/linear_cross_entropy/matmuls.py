"""A chunk between library matmuls: matmul to logits, the row kernel of a backend, matmuls for the gradients.

For one chunk of n rows: 2nHV FLOP for the logits and as many for each of d hidden and d weight, against n·V·4 bytes of
logits, which are written by the matmul, turned into their gradient in place by the row kernel, and read by two matmuls.
"""

from typing import Protocol

import torch
from torch import Tensor

from quietstar.ops._head_matmuls import add_weight_gradient, hidden_gradient, logits_into
from quietstar.ops._precision import compute_dtype
from quietstar.ops._rows import logits_buffer
from quietstar.ops._vocabulary import Softmax
from quietstar.ops.linear_cross_entropy.inputs import Chunk, ChunkResult, RowResult, Scales


class RowKernel(Protocol):
    """What a backend provides: one pass over the rows of a chunk of logits."""

    def __call__(
        self,
        logits: Tensor,
        softmax: Softmax,
        target: Tensor,
        scales: Scales | None,
        entropy: bool,
        gradient_dtype: torch.dtype,
    ) -> RowResult:
        """Per-row nll and entropy, and the gradient for the raw logits of what the scales say.

        Args:
            logits: [n, V] in float32 (float64), unit stride in the last dimension. Overwritten.
            softmax: suppressed tokens get probability 0, and gradient 0.
            target: int64 [n], all in [0, V) and none suppressed.
            scales: [n] in the dtype of the logits, 0 for rows without a gradient. None: no gradient is wanted.
            entropy: whether the entropy is wanted, as it is for its gradient.
            gradient_dtype: what the following matmuls take. p − 1 of the target is formed before rounding to it.
        """


def cross_entropy_chunk(
    row_kernel: RowKernel, chunk: Chunk, d_weight: Tensor | None, needs_hidden: bool, needs_weight: bool
) -> ChunkResult:
    """Nll, entropy and gradients of one chunk by the row kernel of a backend: see :class:`.chunks.ChunkKernel`."""
    hidden, weight = chunk.hidden, chunk.weight
    wide = compute_dtype(weight.dtype)
    logits = logits_buffer(hidden.shape[0], weight.shape[0], wide, weight.device)
    logits_into(logits, hidden, weight)
    # A CPU multiplies half precision in float32 (see _head_matmuls); a GPU wants both operands alike.
    gradient_dtype = weight.dtype if weight.is_cuda else wide
    nll, entropy, d_logits = row_kernel(
        logits, chunk.softmax, chunk.target, chunk.scales, chunk.entropy, gradient_dtype
    )
    if needs_weight:
        d_weight = add_weight_gradient(d_weight, d_logits, hidden)
    return ChunkResult(nll, entropy, hidden_gradient(d_logits, weight) if needs_hidden else None, d_weight)
