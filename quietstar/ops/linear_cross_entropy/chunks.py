"""The chunk loop every backend shares: matmul to logits, row kernel, matmuls for the gradients.

For one chunk of n rows: 2nHV FLOP for the logits and as many for each of d hidden and d weight, against n·V·4 bytes of
logits, which are written by the matmul, turned into their gradient in place by the row kernel, and read by two matmuls.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from quietstar.ops._head_matmuls import add_weight_gradient, hidden_gradient, logits_into
from quietstar.ops._precision import compute_dtype
from quietstar.ops._rows import CHUNK_BYTES, logits_buffer, rows_within, slices
from quietstar.ops._vocabulary import mark_nll
from quietstar.ops.linear_cross_entropy.hidden import MixedHidden, PlainHidden, Rows


class RowKernel(Protocol):
    """What a backend provides: one pass over the rows of a chunk of logits."""

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        scale: Tensor | None,
        temperature: float,
        suppress: Tensor | None,
        gradient_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        """Per-row nll of softmax(logits / temperature), and the gradient of sum(scale · nll) for the raw logits.

        Args:
            logits: [n, V] in float32 (float64), unit stride in the last dimension. Overwritten.
            target: int64 [n], all in [0, V) and none suppressed.
            scale: [n] in the dtype of the logits, 0 for rows without a gradient. None: no gradient is wanted.
            temperature: positive.
            suppress: int64 token ids that get probability 0, and gradient 0.
            gradient_dtype: what the following matmuls take. p − 1 of the target is formed before rounding to it.

        Returns:
            nll [n] in the dtype of the logits; the gradient [n, V], which may live in the memory of the logits.
        """


def cross_entropy_in_chunks(
    row_kernel: RowKernel,
    hidden: PlainHidden | MixedHidden,
    weight: Tensor,
    target: Tensor,
    row_scale: Tensor | None,
    *,
    temperature: float,
    suppress: Tensor | None,
    every_nll: bool,
    weight_needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Per-row nll, and the gradients of sum(row_scale · nll): of the weight returned, the others left in ``hidden``.

    Args:
        row_kernel: of the backend.
        hidden: the head's input rows.
        weight: [V, H].
        target: int64 [rows], marked as in ``_vocabulary``.
        row_scale: [rows] in the compute dtype. None: no gradients.
        temperature, suppress: see :class:`RowKernel`.
        every_nll: whether the nll of rows with row_scale 0 is wanted; it may be left at 0 otherwise.
        weight_needs_gradient: d weight is None if not.

    Returns:
        nll [rows] and d weight [V, H], both in the compute dtype.
    """
    wide = compute_dtype(weight.dtype)
    wants_gradient = row_scale is not None and (hidden.needs_gradient or weight_needs_gradient)
    labelled = target >= 0
    contributing = labelled if row_scale is None else labelled & (row_scale != 0)
    if row_scale is not None:
        row_scale = row_scale.masked_fill(~labelled, 0)
    # A CPU multiplies half precision in float32 (see _head_matmuls); a GPU wants both operands alike.
    gradient_dtype = weight.dtype if weight.is_cuda else wide
    rows, vocabulary = target.shape[0], weight.shape[0]
    nll = torch.zeros(rows, dtype=wide, device=target.device)
    d_weight = None

    step = min(rows_within(CHUNK_BYTES, vocabulary * wide.itemsize, weight.device), max(rows, 1))
    buffer = logits_buffer(step, vocabulary, wide, weight.device)
    for chunk, contributes in _chunks(contributing, labelled if every_nll else contributing, step):
        with_gradient = wants_gradient and contributes
        inputs = hidden.read(chunk)
        logits = buffer[: inputs.shape[0]]
        logits_into(logits, inputs, weight)
        nll[chunk], d_logits = row_kernel(
            logits,
            target[chunk].clamp_min(0),
            row_scale[chunk] if with_gradient else None,
            temperature,
            suppress,
            gradient_dtype,
        )
        if with_gradient and weight_needs_gradient:
            d_weight = add_weight_gradient(d_weight, d_logits, inputs)
        if with_gradient and hidden.needs_gradient:
            hidden.write_gradient(chunk, hidden_gradient(d_logits, weight))
    if weight_needs_gradient and d_weight is None:  # no row contributes
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    return mark_nll(nll, target), d_weight


def _chunks(contributing: Tensor, wanted: Tensor, step: int) -> Iterator[tuple[Rows, bool]]:
    """Chunks of at most ``step`` rows, each with whether it contributes to sum(row_scale · nll).

    On a CPU only wanted rows are computed: about half of the rows of a policy loss have weight 0. Elsewhere finding
    them would wait for the device, and all rows are computed.
    """
    if contributing.device.type != "cpu":
        yield from ((rows, True) for rows in slices(contributing.shape[0], step))
        return
    yield from ((rows, True) for rows in _selected(contributing, step))
    yield from ((rows, False) for rows in _selected(wanted & ~contributing, step))


def _selected(mask: Tensor, step: int) -> Iterator[Rows]:
    if mask.all():
        return slices(mask.shape[0], step)
    numbers = mask.nonzero().squeeze(1)
    return (numbers[part] for part in slices(numbers.shape[0], step))
