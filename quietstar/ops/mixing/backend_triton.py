"""The ``triton`` backend: each logit is read once per pass, and the mix never written unless it is the result.

Bytes per logit, e the size of one: mix_logits 3e, its backward 5e (3e without the weight's gradient); cross-entropy 2e,
its backward 4e. At about 15 instructions a logit all are bound by memory. A row has one program (or, where nothing is
reduced over the row, one per block): splitting it further would only speed up calls of fewer rows than the GPU has
processors, which take microseconds.

Rows of any vocabulary: with V = 32002, rows of bfloat16 begin at multiples of 4 bytes only. Sizes and strides are
therefore passed in units of ALIGN elements, the largest vector all rows are aligned to, which tells the compiler how
wide its accesses may be.
"""

import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quietstar.ops._launch_table import ANY, row_for
from quietstar.ops.mixing.backends import CrossEntropy, Mix


class Block(NamedTuple):
    """Launch parameters of one kernel."""

    row_bytes: int
    """Of each tensor, that a program takes at a time."""
    num_warps: int
    num_stages: int
    """Steps of the loop whose loads are in flight, where there is a loop."""


MIX, MIX_BACKWARD = "mix", "mix backward"
CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD = "cross entropy", "cross entropy backward"

# By kernel and architecture. Enough bytes in flight: 16 a thread from each of two tensors, and as many of each of the
# next num_stages - 1 blocks.
BLOCKS: dict[tuple[str, str], Block] = {
    (MIX, ANY): Block(4096, 8, 1),
    (MIX_BACKWARD, ANY): Block(4096, 8, 3),
    (CROSS_ENTROPY, ANY): Block(4096, 8, 3),
    (CROSS_ENTROPY_BACKWARD, ANY): Block(4096, 8, 1),
}

# The largest of no logits: −inf − (−inf) would be NaN.
_LOWEST = tl.constexpr(-3.4e38)

# The largest float32: what is beyond is infinite. No narrower dtype has it, so that logits are compared as float32, not
# two at a time in their own dtype before they are widened.
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _row_start(tensor, row, sizes, strides, ALIGN: tl.constexpr):
    """Pointer to the first logit of a row; strides of all leading dimensions, sizes of all but the outermost."""
    offset = row * 0
    for i in tl.static_range(len(sizes) - 1, -1, -1):
        offset += row % sizes[i] * strides[i + 1]
        row = row // sizes[i]
    return tensor + (offset + row * strides[0]) * ALIGN


@triton.jit
def _load(row_start, columns, inside):
    return tl.load(row_start + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _difference(b, t):
    """The difference t − b, of which infinities have no part."""
    return tl.where(tl.maximum(tl.abs(b), tl.abs(t)) > _LARGEST, 0.0, t - b)


@triton.jit
def _mixed(b, t, weight):
    """(1 − w) b + w t; −∞ if both are, else −∞ of a weight of exactly 0 adds nothing."""
    no_base, no_thought = b < -_LARGEST, t < -_LARGEST
    of_base = tl.where(no_base, tl.where(weight == 1, 0.0, (weight - 1) * float("inf")), (1 - weight) * b)
    of_thought = tl.where(no_thought, tl.where(weight == 0, 0.0, weight * float("-inf")), weight * t)
    return tl.where(no_base & no_thought, b, of_base + of_thought)


@triton.jit
def _store_split(d_base, d_thought, first, columns, gradient, weight, inside):
    """The gradient of the mix handed on to base and thought, contiguous, in a row that starts at ``first``."""
    if d_base is not None:
        tl.store(d_base + first + columns, gradient * (1 - weight), mask=inside)
    if d_thought is not None:
        tl.store(d_thought + first + columns, gradient * weight, mask=inside)


@triton.jit
def mix_kernel(
    base, thought, mixing_weight, mixed, sizes, base_strides, thought_strides, units, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row of the mix, contiguous. Grid: rows · blocks."""
    vocabulary = units * ALIGN
    blocks = tl.cdiv(vocabulary, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    weight = tl.load(mixing_weight + row).to(tl.float32)
    b = _load(_row_start(base, row, sizes, base_strides, ALIGN), columns, inside)
    t = _load(_row_start(thought, row, sizes, thought_strides, ALIGN), columns, inside)
    tl.store(mixed + row * units * ALIGN + columns, _mixed(b, t, weight), mask=inside)


@triton.jit
def mix_backward_kernel(
    grad, base, thought, mixing_weight, d_base, d_thought, d_weight, sizes, grad_strides, base_strides,
    thought_strides, units, ALIGN: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients that are not None, of one row. Grid: rows."""
    vocabulary = units * ALIGN
    row = tl.program_id(0).to(tl.int64)
    grad = _row_start(grad, row, sizes, grad_strides, ALIGN)
    base = _row_start(base, row, sizes, base_strides, ALIGN)
    thought = _row_start(thought, row, sizes, thought_strides, ALIGN)
    weight = tl.load(mixing_weight + row).to(tl.float32)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        g = _load(grad, columns, inside)
        if d_weight is not None:
            b = _load(base, columns, inside)
            products += g * _difference(b, _load(thought, columns, inside))
        _store_split(d_base, d_thought, row * units * ALIGN, columns, g, weight, inside)
    if d_weight is not None:
        tl.store(d_weight + row, tl.sum(products, 0))


@triton.jit
def cross_entropy_kernel(
    base, thought, mixing_weight, target, nll, slope, largest, log_total, sizes, base_strides, thought_strides,
    units, ALIGN: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A ``.backends.CrossEntropy``, for one row. Grid: rows.

    Each of BLOCK places keeps its own running maximum of the mix z, Σ exp(z − maximum) and
    Σ exp(z − maximum)·(t − b): threads wait for each other once a row, not once a block. Whichever of maximum and z is
    larger, one exponential brings the other to its scale.
    """
    vocabulary = units * ALIGN
    row = tl.program_id(0).to(tl.int64)
    base = _row_start(base, row, sizes, base_strides, ALIGN)
    thought = _row_start(thought, row, sizes, thought_strides, ALIGN)
    weight = tl.load(mixing_weight + row).to(tl.float32)
    peak = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        b = _load(base, columns, inside)
        t = _load(thought, columns, inside)
        difference = _difference(b, t)
        z = tl.where(inside, _mixed(b, t, weight), float("-inf"))
        rises = z > peak
        smaller = tl.exp(-tl.abs(z - peak))
        total = tl.where(rises, total * smaller + 1, total + smaller)
        moment = tl.where(rises, moment * smaller + difference, moment + smaller * difference)
        peak = tl.maximum(peak, z)
    top = tl.max(peak, 0)
    shrink = tl.exp(peak - top)
    sum_row = tl.sum(total * shrink, 0)

    place = tl.load(target + row)
    b = _load(base, place, True)
    t = _load(thought, place, True)
    tl.store(largest + row, top)
    tl.store(log_total + row, tl.log(sum_row))
    tl.store(nll + row, tl.log(sum_row) - (_mixed(b, t, weight) - top))
    tl.store(slope + row, tl.sum(moment * shrink, 0) / sum_row - _difference(b, t))


@triton.jit
def cross_entropy_backward_kernel(
    scale, base, thought, mixing_weight, target, largest, log_total, d_base, d_thought, sizes, base_strides,
    thought_strides, units, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients that are not None, of a block of a row. Grid: rows · blocks."""
    vocabulary = units * ALIGN
    blocks = tl.cdiv(vocabulary, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    weight = tl.load(mixing_weight + row).to(tl.float32)
    row_scale = tl.load(scale + row)
    gradient = tl.zeros((BLOCK,), tl.float32)
    if row_scale != 0:  # ignored rows are not read
        b = _load(_row_start(base, row, sizes, base_strides, ALIGN), columns, inside)
        t = _load(_row_start(thought, row, sizes, thought_strides, ALIGN), columns, inside)
        probability = tl.exp(_mixed(b, t, weight) - tl.load(largest + row) - tl.load(log_total + row))
        gradient = row_scale * (probability - tl.where(columns == tl.load(target + row), 1.0, 0.0))
    _store_split(d_base, d_thought, row * units * ALIGN, columns, gradient, weight, inside)


def mix(mix: Mix) -> Tensor:
    """See ``backends.py``."""
    mixed = torch.empty_like(mix.base, memory_format=torch.contiguous_format)
    rows = _Rows(MIX, mix.base, mix.thought)
    mix_kernel[rows.blocks](*rows.tensors, mix.weight.contiguous(), mixed, *rows.layout, **rows.options)
    return mixed


def mix_backward(grad: Tensor, mix: Mix, needs: list[bool]) -> tuple[Tensor | None, ...]:
    """See ``backends.py``."""
    d_base, d_thought = _gradients(mix.base, needs[:2])
    d_weight = mix.base.new_empty(mix.weight.shape, dtype=torch.float32) if needs[2] else None
    rows = _Rows(MIX_BACKWARD, grad, mix.base, mix.thought)
    mix_backward_kernel[rows.whole](
        *rows.tensors, mix.weight.contiguous(), d_base, d_thought, d_weight, *rows.layout, STAGES=rows.stages,
        **rows.options,
    )  # fmt: skip
    return d_base, d_thought, d_weight


def cross_entropy(mix: Mix, target: Tensor) -> CrossEntropy:
    """See ``backends.py``."""
    result = CrossEntropy(*(mix.base.new_empty(target.shape, dtype=torch.float32) for _ in CrossEntropy._fields))
    rows = _Rows(CROSS_ENTROPY, mix.base, mix.thought)
    cross_entropy_kernel[rows.whole](
        *rows.tensors, mix.weight.contiguous(), target.contiguous(), *result, *rows.layout, STAGES=rows.stages,
        **rows.options,
    )  # fmt: skip
    return result


def cross_entropy_backward(
    scale: Tensor, mix: Mix, target: Tensor, result: CrossEntropy, needs: list[bool]
) -> list[Tensor | None]:
    """See ``backends.py``."""
    gradients = _gradients(mix.base, needs)
    rows = _Rows(CROSS_ENTROPY_BACKWARD, mix.base, mix.thought)
    cross_entropy_backward_kernel[rows.blocks](
        scale.contiguous(), *rows.tensors, mix.weight.contiguous(), target.contiguous(), result.largest,
        result.log_total, *gradients, *rows.layout, **rows.options,
    )  # fmt: skip
    return gradients


def _gradients(logits: Tensor, needs: list[bool]) -> list[Tensor | None]:
    return [torch.empty_like(logits, memory_format=torch.contiguous_format) if needed else None for needed in needs]


class _Rows:
    """Tensors of one shape [..., V] as a kernel sees them: where their rows are, and how many programs they need."""

    def __init__(self, kernel: str, *tensors: Tensor):
        # Any strides but that of the last dimension, which is 1: rows laid out otherwise are copied.
        self.tensors = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
        vocabulary, size = tensors[0].shape[-1], tensors[0].element_size()
        sizes, strides = _merged(self.tensors)
        align = math.gcd(16 // size, vocabulary, *itertools.chain(*strides))
        self.layout = sizes[1:], *(tuple(step // align for step in steps) for steps in strides), vocabulary // align
        row_bytes, num_warps, self.stages = row_for(BLOCKS, kernel, tensors[0])
        block = row_bytes // size
        # Fused multiply-adds by name, since Triton's default is to change.
        self.options = {"ALIGN": align, "BLOCK": block, "num_warps": num_warps, "enable_fp_fusion": True}
        self.whole = (math.prod(sizes),)
        self.blocks = (math.prod(sizes) * triton.cdiv(vocabulary, block),)


def _merged(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Sizes of the leading dimensions, outermost first, and strides per tensor, of which dimensions as few as possible.

    An outer dimension joins the next where all tensors allow it. Those of size 1 say nothing, whatever their strides.
    """
    leading = zip(tensors[0].shape[:-1], zip(*(x.stride()[:-1] for x in tensors), strict=True), strict=True)
    merged = []  # size, stride in every tensor
    for size, steps in reversed([dimension for dimension in leading if dimension[0] != 1]):
        inner, inner_steps = merged[0] if merged else (1, steps)
        if steps == tuple(inner * step for step in inner_steps):
            merged[:1] = [(inner * size, inner_steps)]
        else:
            merged.insert(0, (size, steps))
    sizes, strides = zip(*(merged or [(1, (0,) * len(tensors))]), strict=True)
    return sizes, tuple(zip(*strides, strict=True))
