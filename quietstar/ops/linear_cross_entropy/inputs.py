"""Arguments and results of the linear cross-entropies on their way from the public functions to the kernels.

``PlainHidden`` and ``MixedHidden`` read the rows of the head's input and store their gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quietstar.ops._precision import compute_dtype, widen
from quietstar.ops._vocabulary import Softmax


class Hidden(NamedTuple):
    """The head's input: rows of hidden states, or (1 − w) · hidden[base_index] + w · thought."""

    hidden: Tensor  # [rows, H], or [base rows, H] with an index
    thought: Tensor | None  # [rows, H]
    mixing_weight: Tensor | None  # [rows]
    base_index: Tensor | None  # int [rows]; None is 0..rows−1


class Scales(NamedTuple):
    """Factors of the loss Σ scales.nll · nll − Σ scales.entropy · entropy, whose gradients are computed."""

    nll: Tensor  # [rows] in the compute dtype
    entropy: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Scales":
        """Apply ``change`` to both."""
        return Scales(change(self.nll), None if self.entropy is None else change(self.entropy))

    @property
    def contributing(self) -> Tensor:
        """Which rows contribute to the loss, bool [rows]."""
        return self.nll != 0 if self.entropy is None else (self.nll != 0) | (self.entropy != 0)


class Call(NamedTuple):
    """The arguments of one call of the registered op, which takes them one by one."""

    hidden: Hidden
    weight: Tensor  # [V, H]
    softmax: Softmax
    target: Tensor  # int64 [rows], marked as in ``_vocabulary``
    scales: Scales | None  # None: no gradients
    entropy: bool  # whether the entropy is needed, as it is if it has a scale
    every_row: bool  # whether nll and entropy are needed for rows with scales of 0, too; else they may be 0 or NaN
    needs: list[bool]  # which gradients are needed: hidden, thought, mixing_weight, weight

    @classmethod
    def of(cls, *flat) -> "Call":
        hidden, weight, softmax, target = Hidden(*flat[:4]), flat[4], Softmax(*flat[5:8]), flat[8]
        scales = None if flat[9] is None else Scales(*flat[9:11])
        return cls(hidden, weight, softmax, target, scales, *flat[11:])

    def flat(self) -> tuple:
        return *self.hidden, self.weight, *self.softmax, self.target, *(self.scales or (None, None)), *self[5:]


class Chunk(NamedTuple):
    """Some rows of a call; every one has a target in the vocabulary."""

    hidden: Tensor  # [n, H]
    weight: Tensor  # [V, H]
    softmax: Softmax
    target: Tensor  # int64 [n], all in [0, V) and none suppressed
    scales: Scales | None  # [n]; None: no gradient is needed
    entropy: bool
    weight_dtype: torch.dtype  # dtype that d weight may have


class ChunkResult(NamedTuple):
    """Results of a chunk, in the compute dtype except d weight; None if not needed."""

    nll: Tensor  # [n]
    entropy: Tensor | None  # [n]
    d_hidden: Tensor | None  # [n, H]
    d_weight: Tensor | None  # [V, H] in the compute dtype or the chunk's weight_dtype


class RowResult(NamedTuple):
    """Results of a row kernel for a chunk of logits; None if not needed."""

    nll: Tensor  # [n] in the dtype of the logits
    entropy: Tensor | None  # [n]
    gradient: Tensor | None  # [n, V], which may live in the memory of the logits


# Row numbers of a chunk: a slice if the rows are consecutive, else an int64 tensor.
Rows = slice | Tensor


class PlainHidden:
    """Rows of one tensor [rows, H], and its gradient."""

    def __init__(self, hidden: Tensor, needs_gradient: bool):
        self.hidden = hidden
        self.gradient = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs_gradient else None
        self.needs_gradient = needs_gradient

    def read(self, rows: Rows) -> Tensor:
        return self.hidden[rows]

    def write_gradient(self, rows: Rows, d_hidden: Tensor) -> None:
        """Store the gradient, in the compute dtype, of the rows that ``read(rows)`` returned."""
        self.gradient[rows] = d_hidden.to(self.gradient.dtype)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden, thought_hidden and mixing_weight."""
        return self.gradient, None, None


class MixedHidden:
    """Rows (1 − w) · base[index] + w · thought, and the gradients of base, thought and w.

    They follow from the gradient dX of the mixed rows without another matmul: d base = (1 − w) dX,
    d thought = w dX, dw = dX · (thought − base).
    """

    def __init__(
        self,
        base: Tensor,
        thought: Tensor,
        mixing_weight: Tensor,
        index: Tensor | None,
        needs: list[bool],
        not_counted: Tensor | None = None,
    ):
        """Rows marked by ``not_counted``, bool [rows], get no gradient whatever they hold: 0 times it might be NaN."""
        self.base, self.thought, self.index, self.not_counted = base, thought, index, not_counted
        self.weight = self.gradient_weight = widen(mixing_weight)[:, None]
        if not_counted is not None:
            self.gradient_weight = self.weight.masked_fill(not_counted[:, None], 0)
        self.needs_gradient = any(needs)
        wide = compute_dtype(base.dtype)
        needs_base, needs_thought, needs_weight = needs
        # Several rows may add to one base row, so this sum is kept in the compute dtype.
        base_dtype = base.dtype if index is None else wide
        self.d_base = base.new_zeros(base.shape, dtype=base_dtype) if needs_base else None
        self.d_thought = thought.new_zeros(thought.shape) if needs_thought else None
        self.d_weight = thought.new_zeros(thought.shape[0], dtype=wide) if needs_weight else None

    def _sources(self, rows: Rows) -> tuple[Tensor, Tensor]:
        base = self.base[rows] if self.index is None else self.base.index_select(0, self.index[rows])
        return widen(base), widen(self.thought[rows])

    def read(self, rows: Rows) -> Tensor:
        base, thought = self._sources(rows)
        return torch.lerp(base, thought, self.weight[rows].to(base.dtype)).to(self.thought.dtype)

    def write_gradient(self, rows: Rows, d_mixed: Tensor) -> None:
        weight = self.gradient_weight[rows].to(d_mixed.dtype)
        if self.d_weight is not None:
            base, thought = self._sources(rows)
            self.d_weight[rows] = torch.linalg.vecdot(d_mixed, thought - base)
        if self.d_thought is not None:
            self.d_thought[rows] = (d_mixed * weight).to(self.d_thought.dtype)
        if self.d_base is None:
            return
        d_base = d_mixed.mul_(1 - weight)
        if self.index is None:
            self.d_base[rows] = d_base.to(self.d_base.dtype)
        else:
            self._add_to_base(rows, d_base)

    def _add_to_base(self, rows: Rows, d_base: Tensor) -> None:
        if d_base.is_cuda:  # where index_add_ would use atomics, whose order changes from run to run
            self.d_base.index_put_((self.index[rows],), d_base, accumulate=True)
        else:
            self.d_base.index_add_(0, self.index[rows], d_base)

    def gradients(self) -> tuple[Tensor | None, ...]:
        d_base = None if self.d_base is None else self.d_base.to(self.base.dtype)
        if self.d_weight is not None and self.not_counted is not None:
            self.d_weight.masked_fill_(self.not_counted, 0)
        return d_base, self.d_thought, self.d_weight
