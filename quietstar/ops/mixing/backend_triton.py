"""The ``triton`` backend: each pass reads every logit once, and only ``mix_logits`` writes the mix.

Bytes moved per logit, where e is its size: mix_logits 3e, its backward 5e (3e without the weight's gradient);
cross-entropy 2e, its backward 4e. At about 15 instructions per logit, all are bound by memory. A row has one program
(or, if nothing is reduced over the row, one per block). Splitting it further would only speed up calls with fewer rows
than the GPU has multiprocessors, which take microseconds.

Rows of any vocabulary size are supported: with V = 32002, rows of bfloat16 begin at multiples of only 4 bytes. So sizes
and strides are passed in units of ALIGN elements, the largest vector that all rows are aligned to, which tells the
compiler how wide its accesses may be.
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
    """Elements of each tensor that a program takes at a time."""
    num_warps: int
    num_stages: int
    """Steps of the loop, if there is one, whose loads are in flight."""


MIX, MIX_BACKWARD = "mix", "mix backward"
CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD = "cross entropy", "cross entropy backward"

# By kernel and architecture. They keep enough bytes in flight: 16 per thread from each of two tensors, and as many from
# each of the next num_stages - 1 blocks.
BLOCKS: dict[tuple[str, str], Block] = {
    (MIX, ANY): Block(4096, 8, 1),
    (MIX_BACKWARD, ANY): Block(4096, 8, 3),
    (CROSS_ENTROPY, ANY): Block(4096, 8, 3),
    (CROSS_ENTROPY_BACKWARD, ANY): Block(4096, 8, 1),
}

# The maximum of an empty set of logits; −inf − (−inf) would be NaN.
_LOWEST = tl.constexpr(-3.4e38)

# The largest finite float32. No narrower dtype has it, so logits are compared as float32, not two at a time in their
# own dtype before they are widened.
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _row_start(tensor, row, sizes, strides, ALIGN: tl.constexpr):
    """Return a pointer to the first logit of a row; ``sizes`` lacks the outermost leading dimension, strides do not."""
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
    """Compute t − b, or 0 where either is infinite."""
    return tl.where(tl.maximum(tl.abs(b), tl.abs(t)) > _LARGEST, 0.0, t - b)


@triton.jit
def _mixed(b, t, weight):
    """Compute (1 − w) b + w t; −∞ if both are −∞, else −∞ of weight exactly 0 adds nothing."""
    no_base, no_thought = b < -_LARGEST, t < -_LARGEST
    of_base = tl.where(no_base, tl.where(weight == 1, 0.0, (weight - 1) * float("inf")), (1 - weight) * b)
    of_thought = tl.where(no_thought, tl.where(weight == 0, 0.0, weight * float("-inf")), weight * t)
    return tl.where(no_base & no_thought, b, of_base + of_thought)


@triton.jit
def _store_split(d_base, d_thought, first, columns, gradient, weight, inside):
    """Split the mix's gradient into those of base and thought (contiguous), in a row that starts at ``first``."""
    if d_base is not None:
        tl.store(d_base + first + columns, gradient * (1 - weight), mask=inside)
    if d_thought is not None:
        tl.store(d_thought + first + columns, gradient * weight, mask=inside)


@triton.jit
def mix_kernel(
    base, thought, mixing_weight, mixed, sizes, base_strides, thought_strides, units, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute a block of a row of the mix, contiguous. Grid: rows · blocks."""
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
    """Compute those gradients of one row that are not None. Grid: rows."""
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
    """Compute a ``.backends.CrossEntropy`` for one row. Grid: rows.

    Each of BLOCK places keeps its own running maximum of the mix z, Σ exp(z − maximum) and
    Σ exp(z − maximum)·(t − b), so that threads synchronise once per row, not once per block. Whichever of maximum and z
    is larger, one exponential rescales the other.
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
    """Compute those gradients of a block of a row that are not None. Grid: rows · blocks."""
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
    """Tensors of one shape [..., V] in the form that a kernel takes: places of rows, and the number of programs."""

    def __init__(self, kernel: str, *tensors: Tensor):
        # Strides are arbitrary except that of the last dimension, which must be 1: other rows are copied.
        self.tensors = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
        vocabulary, size = tensors[0].shape[-1], tensors[0].element_size()
        sizes, strides = _merged(self.tensors)
        align = math.gcd(16 // size, vocabulary, *itertools.chain(*strides))
        self.layout = sizes[1:], *(tuple(step // align for step in steps) for steps in strides), vocabulary // align
        row_bytes, num_warps, self.stages = row_for(BLOCKS, kernel, tensors[0])
        block = row_bytes // size
        # Fused multiply-adds are set explicitly because Triton's default will change.
        self.options = {"ALIGN": align, "BLOCK": block, "num_warps": num_warps, "enable_fp_fusion": True}
        self.whole = (math.prod(sizes),)
        self.blocks = (math.prod(sizes) * triton.cdiv(vocabulary, block),)


def _merged(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Merge leading dimensions as far as possible; returns their sizes, outermost first, and strides per tensor.

    An outer dimension is merged with the next if all tensors allow it. Dimensions of size 1 are dropped.
    """
    leading = zip(tensors[0].shape[:-1], zip(*(x.stride()[:-1] for x in tensors), strict=True), strict=True)
    merged = []  # size, and stride in every tensor
    for size, steps in reversed([dimension for dimension in leading if dimension[0] != 1]):
        inner, inner_steps = merged[0] if merged else (1, steps)
        if steps == tuple(inner * step for step in inner_steps):
            merged[:1] = [(inner * size, inner_steps)]
        else:
            merged.insert(0, (size, steps))
    sizes, strides = zip(*(merged or [(1, (0,) * len(tensors))]), strict=True)
    return sizes, tuple(zip(*strides, strict=True))
