"""What a linear cross-entropy is of, as its parts are handed from the public function down to the kernels."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from quietstar.ops._vocabulary import Softmax


class Hidden(NamedTuple):
    """The head's input: rows of hidden states, or of (1 − w) · hidden[base_index] + w · thought."""

    hidden: Tensor  # [rows, H], or [base rows, H] with an index
    thought: Tensor | None  # [rows, H]
    mixing_weight: Tensor | None  # [rows]
    base_index: Tensor | None  # int [rows]; None is 0..rows−1


class Scales(NamedTuple):
    """What the gradients are of: Σ nll · (the nll of each row) − Σ entropy · (its entropy)."""

    nll: Tensor  # [rows] in the compute dtype
    entropy: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Scales":
        """Both, changed alike."""
        return Scales(change(self.nll), None if self.entropy is None else change(self.entropy))

    @property
    def contributing(self) -> Tensor:
        """Which rows count, bool [rows]."""
        return self.nll != 0 if self.entropy is None else (self.nll != 0) | (self.entropy != 0)


class Call(NamedTuple):
    """One call of the registered op, which takes these one by one."""

    hidden: Hidden
    weight: Tensor  # [V, H]
    softmax: Softmax
    target: Tensor  # int64 [rows], marked as in ``_vocabulary``
    scales: Scales | None  # None: no gradients
    entropy: bool  # whether the entropy is wanted; it is with a scale
    every_row: bool  # whether nll and entropy are, of rows with scales of 0, too: they may be 0 or NaN otherwise
    needs: list[bool]  # gradients of hidden, thought, mixing_weight, weight

    @classmethod
    def of(cls, *flat) -> "Call":
        hidden, weight, softmax, target = Hidden(*flat[:4]), flat[4], Softmax(*flat[5:8]), flat[8]
        scales = None if flat[9] is None else Scales(*flat[9:11])
        return cls(hidden, weight, softmax, target, scales, *flat[11:])

    def flat(self) -> tuple:
        return *self.hidden, self.weight, *self.softmax, self.target, *(self.scales or (None, None)), *self[5:]


class Chunk(NamedTuple):
    """Some rows of a call, none of them absent or of a target that is not in the vocabulary."""

    hidden: Tensor  # [n, H]
    weight: Tensor  # [V, H]
    softmax: Softmax
    target: Tensor  # int64 [n], all in [0, V) and none suppressed
    scales: Scales | None  # [n]; None: no gradient is wanted
    entropy: bool


class ChunkResult(NamedTuple):
    """Of a chunk, all in the compute dtype; None where not wanted."""

    nll: Tensor  # [n]
    entropy: Tensor | None  # [n]
    d_hidden: Tensor | None  # [n, H]
    d_weight: Tensor | None  # [V, H]


class RowResult(NamedTuple):
    """Of a chunk of logits; None where not wanted."""

    nll: Tensor  # [n] in the dtype of the logits
    entropy: Tensor | None  # [n]
    gradient: Tensor | None  # [n, V], which may live in the memory of the logits
