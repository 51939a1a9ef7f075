"""The ``triton`` backend: the row kernel, which turns a chunk of logits into nll and gradient.

Bytes per logit: the matmul writes 4 of float32, the row kernel reads them, and writes 2 of gradient in half precision
(4 in float32) into the same memory, so that nothing but the one chunk is held. The gradient keeps the rows' pitch: row
r of it begins where row r of the logits did, aligned for the matmuls that follow.

A row of up to 32,768 logits stays in the registers of its program, at most 32 a thread: 6 bytes per logit, each moved
once. Longer rows are read twice, for the sum and for the gradient: 10 bytes. At V = 32,002 the second read would mostly
hit the L2 cache (132 rows of 125 KiB are in flight), but still cost about a quarter more time there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LONGEST_RESIDENT = 32768

# Rows of logits begin at multiples of this many elements (see _rows.logits_buffer) and may be read and written up to
# one: a mask that ends there still allows 16-byte accesses, one that ends at V = 32002 does not.
_ALIGNMENT = 16

# The largest of no logits: −inf − (−inf) would be NaN.
_LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def _load(row, columns, vocabulary, limit):
    logits = tl.load(row + columns, mask=columns < limit, other=0.0)
    return tl.where(columns < vocabulary, logits, float("-inf"))


@triton.jit
def _store_at_target(gradient, place, exponential, total, factor):
    """Turn the target's gradient from p into p − 1, times its scale; the difference is taken before anything rounds."""
    tl.debug_barrier()  # after whichever thread wrote it with the others
    tl.store(gradient + place, (exponential - total) * factor)


@triton.jit
def resident_kernel(
    logits, target, scale, nll, gradient, stride, gradient_stride, vocabulary, limit, inverse_temperature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, read once. Grid: rows. Without ``scale`` no gradient is written."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, BLOCK)
    place = tl.load(target + row).to(tl.int32)
    at_target = tl.load(logits + place)
    z = _load(logits, columns, vocabulary, limit)
    tl.debug_barrier()  # all threads have read before one writes the gradient into the same memory
    top = tl.max(z, 0)
    exponential = tl.exp((z - top) * inverse_temperature)
    total = tl.sum(exponential, 0)
    at_target = (at_target - top) * inverse_temperature
    tl.store(nll + row, tl.log(total) - at_target)
    if scale is not None:
        gradient += row * gradient_stride
        factor = tl.load(scale + row) * inverse_temperature / total
        tl.store(gradient + columns, exponential * factor, mask=columns < limit)
        _store_at_target(gradient, place, tl.exp(at_target), total, factor)


@triton.jit
def streaming_kernel(
    logits, target, scale, nll, gradient, stride, gradient_stride, vocabulary, limit, inverse_temperature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of any length, read twice. Grid: rows. Without ``scale`` it is read once and no gradient written.

    Each of BLOCK places keeps its own running maximum and sum of exponentials: threads wait for each other once a row,
    not once a block. Whichever of maximum and logit is larger, one exponential brings the other to its scale.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    place = tl.load(target + row).to(tl.int32)
    at_target = tl.load(logits + place)
    peak = tl.full((BLOCK,), _LOWEST, tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=3):
        z = _load(logits, start + tl.arange(0, BLOCK), vocabulary, limit)
        smaller = tl.exp(-tl.abs(z - peak) * inverse_temperature)
        totals = tl.where(z > peak, totals * smaller + 1, totals + smaller)
        peak = tl.maximum(peak, z)
    top = tl.max(peak, 0)
    total = tl.sum(totals * tl.exp((peak - top) * inverse_temperature), 0)
    at_target = (at_target - top) * inverse_temperature
    tl.store(nll + row, tl.log(total) - at_target)
    if scale is not None:
        gradient += row * gradient_stride
        factor = tl.load(scale + row) * inverse_temperature / total
        for start in tl.range(0, vocabulary, BLOCK, num_stages=1):
            columns = start + tl.arange(0, BLOCK)
            exponential = tl.exp((_load(logits, columns, vocabulary, limit) - top) * inverse_temperature)
            tl.debug_barrier()  # half as wide, the gradient of a block covers logits of this block and earlier ones
            tl.store(gradient + columns, exponential * factor, mask=columns < limit)
        _store_at_target(gradient, place, tl.exp(at_target), total, factor)


def cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    temperature: float,
    suppress: Tensor | None,
    gradient_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Nll of every row and, over the logits, its gradient: see :class:`.matmuls.RowKernel`."""
    rows, vocabulary = logits.shape
    if suppress is not None:
        logits.index_fill_(1, suppress, float("-inf"))
    nll = logits.new_empty(rows)
    gradient = logits.view(gradient_dtype)[:, :vocabulary]
    aligned = logits.stride(0) % _ALIGNMENT == 0
    limit = triton.cdiv(vocabulary, _ALIGNMENT) * _ALIGNMENT if aligned else vocabulary
    if vocabulary <= _LONGEST_RESIDENT:
        kernel, block = resident_kernel, max(triton.next_power_of_2(vocabulary), 512)
    else:
        kernel, block = streaming_kernel, 8192
    kernel[(rows,)](
        logits, target, scale, nll, gradient, logits.stride(0), gradient.stride(0), vocabulary, limit, 1 / temperature,
        BLOCK=block, num_warps=min(max(block // 512, 4), 32), enable_fp_fusion=True,  # whatever Triton's default is
    )  # fmt: skip
    return nll, None if scale is None else gradient
