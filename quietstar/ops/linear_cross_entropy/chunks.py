"""The loop over chunks of rows that all backends share, so that logits [rows, V] are never stored as a whole."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from quietstar.ops._head_matmuls import add_weight_gradient, hidden_gradient, logits_into, weight_gradient_dtype
from quietstar.ops._precision import compute_dtype
from quietstar.ops._rows import CHUNK_BYTES, logits_buffer, rows_within, slices
from quietstar.ops._vocabulary import Softmax, mark_rows
from quietstar.ops.linear_cross_entropy.inputs import (
    Call,
    Chunk,
    ChunkResult,
    MixedHidden,
    PlainHidden,
    RowResult,
    Rows,
    Scales,
)


class ChunkKernel(Protocol):
    """The function that a backend provides for the nll, entropy and gradients of one chunk."""

    def __call__(self, chunk: Chunk, d_weight: Tensor | None, needs_hidden: bool, needs_weight: bool) -> ChunkResult:
        """Compute nll and entropy of every row, and the gradients of the loss given by the chunk's scales.

        Args:
            chunk: the rows.
            d_weight: [V, H] in the compute dtype, to which the chunk's part is added in place. None stands for 0.
            needs_hidden, needs_weight: which gradients are needed; neither without scales.
        """


class RowKernel(Protocol):
    """The function that a backend provides for one pass over the rows of a chunk of logits."""

    def __call__(
        self,
        logits: Tensor,
        softmax: Softmax,
        target: Tensor,
        scales: Scales | None,
        entropy: bool,
        gradient_dtype: torch.dtype,
    ) -> RowResult:
        """Compute per-row nll and entropy, and the gradient, w.r.t. the raw logits, of the loss given by the scales.

        Args:
            logits: [n, V] in float32 (float64), unit stride in the last dimension. Overwritten.
            softmax: suppressed tokens get probability 0, and gradient 0.
            target: int64 [n], all in [0, V) and none suppressed.
            scales: [n] in the dtype of the logits, 0 for rows without a gradient. None: no gradient is needed.
            entropy: whether the entropy is needed, as it is for its gradient.
            gradient_dtype: dtype of the following matmuls. p − 1 of the target is computed before rounding to it.
        """


def chunk_solver(row_kernel: RowKernel) -> ChunkKernel:
    """Create a chunk kernel from a row kernel: a library matmul for the logits, the row kernel, matmuls for gradients.

    One chunk of n rows takes 2nHV FLOPs for the logits and as many for each of d hidden and d weight, against n·V·4
    bytes of logits. These are written by the matmul, replaced by their gradient in the row kernel, and read by two
    matmuls.

    Half-precision logits would halve these bytes, but rounding the largest logits would then be the largest error. For
    rows whose target has a logit of 10 (H = 1024, V = 8000, bfloat16), the nll would be off by 1.2e-2 and d hidden by
    0.43 %, while rounding the hidden states costs 2.6e-3 and 0.09 %; for a logit of 20, by 6.2e-5 and 1.3 % against
    1.3e-5 and 0.27 %.
    """

    def solve_chunk(chunk: Chunk, d_weight: Tensor | None, needs_hidden: bool, needs_weight: bool) -> ChunkResult:
        hidden, weight = chunk.hidden, chunk.weight
        wide = compute_dtype(weight.dtype)
        logits = logits_buffer(hidden.shape[0], weight.shape[0], wide, weight.device)
        logits_into(logits, hidden, weight)
        # A CPU multiplies half precision in float32 (see _head_matmuls); a GPU needs two operands of one dtype.
        gradient_dtype = weight.dtype if weight.is_cuda else wide
        nll, entropy, d_logits = row_kernel(
            logits, chunk.softmax, chunk.target, chunk.scales, chunk.entropy, gradient_dtype
        )
        if needs_weight:
            d_weight = add_weight_gradient(d_weight, d_logits, hidden, chunk.weight_dtype)
        return ChunkResult(nll, entropy, hidden_gradient(d_logits, weight) if needs_hidden else None, d_weight)

    return solve_chunk


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply the gradient in place by the scalar tensor ``factor`` with library calls: one pass, even if it is 1."""
    gradient.mul_(factor)


def cross_entropy_in_chunks(
    chunk_kernel: ChunkKernel, hidden: PlainHidden | MixedHidden, call: Call, contributing: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute nll and entropy of every row, and the gradients; those other than d weight are stored in ``hidden``.

    Args:
        chunk_kernel: the backend's kernel.
        hidden: the head's input rows.
        call: the call, which says what is needed.
        contributing: bool [rows], which rows have a target and, if there are scales, one that is not 0. Other rows
            contribute to no gradient, whatever they hold.

    Returns:
        nll [rows] and entropy [rows] in the compute dtype, and d weight [V, H] in the dtype of
        ``weight_gradient_dtype``. Several chunks are summed in the compute dtype; a single one is rounded by its
        matmul. None where not needed.
    """
    weight, target, scales = call.weight, call.target, call.scales
    wide = compute_dtype(weight.dtype)
    labelled = target >= 0
    wanted = labelled if call.every_row else contributing
    if scales is not None:
        scales = scales.each(lambda scale: scale.masked_fill(~labelled, 0))
    nll = torch.zeros(target.shape[0], dtype=wide, device=target.device)
    entropy = torch.zeros_like(nll) if call.entropy else None
    d_weight = None

    most = rows_within(CHUNK_BYTES, weight.shape[0] * wide.itemsize, weight.device)
    dtype = weight_gradient_dtype(weight)
    parts = list(_chunks(contributing, wanted, most))
    for part, contributes in parts:
        needs_hidden = scales is not None and contributes and hidden.needs_gradient
        needs_weight = scales is not None and contributes and call.needs[3]
        rows, absent = _without_absent(hidden.read(part), contributing[part], wanted[part])
        of_part = None
        if needs_hidden or needs_weight:
            of_part = scales.each(lambda scale, part=part: scale[part])
        chunk = Chunk(
            rows, weight, call.softmax, target[part].clamp_min(0), of_part, call.entropy,
            weight_dtype=dtype if len(parts) == 1 else wide,
        )  # fmt: skip
        result = chunk_kernel(chunk, d_weight, needs_hidden, needs_weight)
        d_weight = result.d_weight
        nll[part] = result.nll.masked_fill_(absent, float("nan"))
        if entropy is not None:
            entropy[part] = result.entropy.masked_fill_(absent, float("nan"))
        if needs_hidden:
            hidden.write_gradient(part, result.d_hidden)
    if call.needs[3] and d_weight is None:  # no row contributes
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    if d_weight is not None:
        d_weight = d_weight.to(dtype)
    return mark_rows(nll, target), None if entropy is None else mark_rows(entropy, target), d_weight


def _without_absent(rows: Tensor, contributing: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Zero rows that are absent (fillers of the chunk and broken rows), and return also which rows they are.

    Such rows do not contribute, but if one held NaN, d weight would be NaN, since 0 · NaN is NaN.
    """
    others = ~contributing
    if others.device.type == "cpu" and not others.any():
        return rows, others
    broken = ~torch.linalg.vector_norm(rows, torch.inf, dim=1).isfinite()
    absent = others & (broken | ~wanted)
    return rows.masked_fill(absent[:, None], 0), absent


def _chunks(contributing: Tensor, wanted: Tensor, most: int) -> Iterator[tuple[Rows, bool]]:
    """Yield chunks of at most ``most`` rows, each with whether it contributes to the gradients.

    On a CPU only wanted rows are computed, since about half of the rows of a policy loss have weight 0. Elsewhere all
    rows are computed, since finding the wanted ones would wait for the device.
    """
    if contributing.device.type != "cpu":
        yield from ((rows, True) for rows in _even_slices(contributing.shape[0], most))
        return
    yield from ((rows, True) for rows in _selected(contributing, most))
    yield from ((rows, False) for rows in _selected(wanted & ~contributing, most))


def _selected(mask: Tensor, most: int) -> Iterator[Rows]:
    if mask.all():
        return _even_slices(mask.shape[0], most)
    numbers = mask.nonzero().squeeze(1)
    return (numbers[part] for part in _even_slices(numbers.shape[0], most))


def _even_slices(rows: int, most: int) -> Iterator[slice]:
    """Split 0..rows into as few slices as possible, of about equal size, since every chunk reads the whole weight."""
    return slices(rows, -(-rows // -(-rows // most))) if rows else iter(())
