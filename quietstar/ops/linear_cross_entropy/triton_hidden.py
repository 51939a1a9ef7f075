"""Mixing of hidden states and its backward, each in one pass over rows x H.

Bytes per element in half precision: 6 to mix (two reads, one write); 14 to split the gradient (reads float32 dX, base
and thought, writes two gradients; 2 more where base rows repeat). Library calls move about 34 and 60.
"""

import triton
import triton.language as tl
from torch import Tensor

from quietstar.ops.linear_cross_entropy.hidden import MixedHidden, Rows

# Fused multiply-adds by name, since Triton's default is to change.
_OPTIONS = {"BLOCK": 2048, "num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def _load_pair(base, thought, index, row, columns, inside, base_strides, thought_strides):
    """Elements of a row of thought, and of the row of base it is mixed with, in float32."""
    base_row = row
    if index is not None:
        base_row = tl.load(index + row).to(tl.int64)
    columns = columns.to(tl.int64)
    b = tl.load(base + base_row * base_strides[0] + columns * base_strides[1], mask=inside, other=0.0)
    t = tl.load(thought + row * thought_strides[0] + columns * thought_strides[1], mask=inside, other=0.0)
    return b.to(tl.float32), t.to(tl.float32)


@triton.jit(do_not_specialize=["first_row"])
def mix_hidden_kernel(
    base, thought, mixing_weight, index, mixed, first_row, base_strides, thought_strides, hidden_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row of the mix, [rows, H] contiguous, of the rows from ``first_row`` on. Grid: rows, blocks."""
    place = tl.program_id(0).to(tl.int64)
    row = first_row + place
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden_size
    b, t = _load_pair(base, thought, index, row, columns, inside, base_strides, thought_strides)
    mix = b + tl.load(mixing_weight + row) * (t - b)
    tl.store(mixed + place * hidden_size + columns, mix, mask=inside)


@triton.jit(do_not_specialize=["first_row"])
def split_gradient_kernel(
    d_mixed, base, thought, mixing_weight, index, d_base, d_thought, d_weight, first_row, base_strides,
    thought_strides, hidden_size, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of base, thought and weight, those that are not None, from that of a row of the mix. Grid: rows.

    All are contiguous and begin at ``first_row``, like ``d_mixed``, which may be ``d_base``.
    """
    place = tl.program_id(0).to(tl.int64)
    row = first_row + place
    weight = tl.load(mixing_weight + row)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, hidden_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < hidden_size
        offsets = place * hidden_size + columns
        g = tl.load(d_mixed + offsets, mask=inside, other=0.0)
        if d_weight is not None:
            b, t = _load_pair(base, thought, index, row, columns, inside, base_strides, thought_strides)
            products += g * (t - b)
        if d_thought is not None:
            tl.store(d_thought + offsets, g * weight, mask=inside)
        if d_base is not None:
            tl.store(d_base + offsets, g * (1 - weight), mask=inside)
    if d_weight is not None:
        tl.store(d_weight + place, tl.sum(products, 0))


class FusedMixedHidden(MixedHidden):
    """:class:`MixedHidden` in Triton kernels. Rows picked by number, which only a CPU does, are left to the library."""

    def __init__(self, *arguments: object):
        super().__init__(*arguments)
        self.weight, self.gradient_weight = self.weight.contiguous(), self.gradient_weight.contiguous()
        self.index = None if self.index is None else self.index.contiguous()

    def read(self, rows: Rows) -> Tensor:
        if isinstance(rows, Tensor):
            return super().read(rows)
        count, hidden_size = rows.stop - rows.start, self.thought.shape[1]
        mixed = self.thought.new_empty(count, hidden_size)
        mix_hidden_kernel[(count, triton.cdiv(hidden_size, _OPTIONS["BLOCK"]))](
            self.base, self.thought, self.weight, self.index, mixed, rows.start,
            self.base.stride(), self.thought.stride(), hidden_size, **_OPTIONS,
        )  # fmt: skip
        return mixed

    def write_gradient(self, rows: Rows, d_mixed: Tensor) -> None:
        if isinstance(rows, Tensor):
            super().write_gradient(rows, d_mixed)
            return
        d_base, d_thought, d_weight = (
            None if gradient is None else gradient[rows] for gradient in (self.d_base, self.d_thought, self.d_weight)
        )
        repeats = d_base is not None and self.index is not None
        if repeats:
            d_base = d_mixed
        split_gradient_kernel[(d_mixed.shape[0],)](
            d_mixed, self.base, self.thought, self.gradient_weight, self.index, d_base, d_thought, d_weight, rows.start,
            self.base.stride(), self.thought.stride(), d_mixed.shape[1], **_OPTIONS,
        )  # fmt: skip
        if repeats:
            self._add_to_base(rows, d_mixed)
