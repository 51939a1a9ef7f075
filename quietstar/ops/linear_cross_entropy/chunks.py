"""The loop over chunks of rows that every backend shares: logits of size rows · V are never held as a whole."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from quietstar.ops._precision import compute_dtype
from quietstar.ops._rows import CHUNK_BYTES, rows_within, slices
from quietstar.ops._vocabulary import mark_nll
from quietstar.ops.linear_cross_entropy.hidden import MixedHidden, PlainHidden, Rows


class ChunkKernel(Protocol):
    """What a backend provides: nll and gradients of the rows of one chunk."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        scale: Tensor | None,
        temperature: float,
        suppress: Tensor | None,
        d_weight: Tensor | None,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Per-row nll of softmax(hidden · weightᵀ / temperature), and the gradients of sum(scale · nll).

        Args:
            hidden: [n, H].
            weight: [V, H].
            target: int64 [n], all in [0, V) and none suppressed.
            scale: [n] in the compute dtype, 0 for rows without a gradient. None: no gradient is wanted.
            temperature: positive.
            suppress: int64 token ids that get probability 0, and gradient 0.
            d_weight: [V, H] in the compute dtype, to which the chunk's part is added in place. None: it is 0.
            needs_hidden, needs_weight: which gradients are wanted; none without a scale.

        Returns:
            nll [n], d hidden [n, H] and d weight [V, H] in the compute dtype; gradients are None if not wanted.
        """


def cross_entropy_in_chunks(
    chunk_kernel: ChunkKernel,
    hidden: PlainHidden | MixedHidden,
    weight: Tensor,
    target: Tensor,
    row_scale: Tensor | None,
    contributing: Tensor,
    *,
    temperature: float,
    suppress: Tensor | None,
    every_nll: bool,
    weight_needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Per-row nll, and the gradients of sum(row_scale · nll): of the weight returned, the others left in ``hidden``.

    Args:
        chunk_kernel: of the backend.
        hidden: the head's input rows.
        weight: [V, H].
        target: int64 [rows], marked as in ``_vocabulary``.
        row_scale: [rows] in the compute dtype. None: no gradients.
        contributing: bool [rows], which rows have a target and, if there is one, a scale other than 0. Of the others,
            whatever they hold, nothing reaches a gradient.
        temperature, suppress: see :class:`ChunkKernel`.
        every_nll: whether the nll of rows with row_scale 0 is wanted; it may be 0 or NaN otherwise.
        weight_needs_gradient: d weight is None if not.

    Returns:
        nll [rows] and d weight [V, H], both in the compute dtype.
    """
    wide = compute_dtype(weight.dtype)
    labelled = target >= 0
    wanted = labelled if every_nll else contributing
    if row_scale is not None:
        row_scale = row_scale.masked_fill(~labelled, 0)
    nll = torch.zeros(target.shape[0], dtype=wide, device=target.device)
    d_weight = None

    most = rows_within(CHUNK_BYTES, weight.shape[0] * wide.itemsize, weight.device)
    for chunk, contributes in _chunks(contributing, wanted, most):
        needs_hidden = row_scale is not None and contributes and hidden.needs_gradient
        needs_weight = row_scale is not None and contributes and weight_needs_gradient
        rows, absent = _without_absent(hidden.read(chunk), contributing[chunk], wanted[chunk])
        chunk_nll, d_hidden, d_weight = chunk_kernel(
            rows,
            weight,
            target[chunk].clamp_min(0),
            row_scale[chunk] if needs_hidden or needs_weight else None,
            temperature,
            suppress,
            d_weight,
            needs_hidden,
            needs_weight,
        )
        nll[chunk] = chunk_nll.masked_fill_(absent, float("nan"))
        if needs_hidden:
            hidden.write_gradient(chunk, d_hidden)
    if weight_needs_gradient and d_weight is None:  # no row contributes
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    return mark_nll(nll, target), d_weight


def _without_absent(rows: Tensor, contributing: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The rows with 0 in those that are absent, and which are: those that only make up the chunk, and broken ones.

    They do not contribute. But d weight would be NaN if one of them were, since 0 · NaN is.
    """
    others = ~contributing
    if others.device.type == "cpu" and not others.any():
        return rows, others
    broken = ~torch.linalg.vector_norm(rows, torch.inf, dim=1).isfinite()
    absent = others & (broken | ~wanted)
    return rows.masked_fill(absent[:, None], 0), absent


def _chunks(contributing: Tensor, wanted: Tensor, most: int) -> Iterator[tuple[Rows, bool]]:
    """Chunks of at most ``most`` rows, each with whether it contributes to sum(row_scale · nll).

    On a CPU only wanted rows are computed: about half of the rows of a policy loss have weight 0. Elsewhere finding
    them would wait for the device, and all rows are computed.
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
    """0..rows in as few slices as there can be, of about the same size: every chunk reads the whole weight."""
    return slices(rows, -(-rows // -(-rows // most))) if rows else iter(())
