"""The ``triton`` backend: the row kernel, and mixing of hidden states.

The row kernel turns a chunk of logits into nll, entropy and gradient.

Bytes per logit: the matmul writes 4 (float32); the row kernel reads them and writes 2 of gradient in half precision (4
in float32) into the same memory, so that only one chunk is stored. The gradient keeps the pitch of the rows: its row r
is at the place of row r of the logits, aligned for the matmuls that follow.

A row of up to 32,768 logits stays in the registers of its program, at most 32 per thread: 6 bytes per logit, each moved
once. Longer rows are read twice, for the sum and for the gradient: 10 bytes per logit. For V = 128,256 and 152,064, a
row fits neither the registers nor the shared memory of a multiprocessor (483 KiB together). The second read begins
where the first ended: 132 rows of 501 KiB are in flight, and the 50 MB of L2 cache may still hold the last half of
them. With a cap, or with the gradient of an entropy, rows of up to 8,192 logits stay in registers.

Mixing of hidden states, and splitting of their gradient, take one pass over rows x H each. Bytes per element in half
precision: 6 to mix (two reads, one write), and 14 to split the gradient (reads float32 dX, base and thought, writes two
gradients; 2 more if base rows repeat). Library calls move about 34 and 60.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quietstar.ops._launch_table import ANY, row_for
from quietstar.ops._triton_softcap import capped
from quietstar.ops._vocabulary import Softmax
from quietstar.ops.linear_cross_entropy import inputs
from quietstar.ops.linear_cross_entropy.chunks import chunk_solver
from quietstar.ops.linear_cross_entropy.inputs import RowResult, Scales
from quietstar.ops.linear_cross_entropy.triton_scale import scale_

__all__ = ["MixedHidden", "scale_", "solve_chunk"]

_LONGEST_RESIDENT = 32768

# Rows of logits begin at multiples of this many elements (see _rows.logits_buffer) and may be read and written up to a
# multiple: a mask that ends there allows 16-byte accesses, one that ends at V = 32002 does not.
_ALIGNMENT = 16

# The maximum of an empty set of logits; −inf − (−inf) would be NaN.
_LOWEST = tl.constexpr(-3.4e38)

# Lower limit on differences of logits that are multiplied by their exponentials; −∞ times 0 would be NaN.
_FAR_BELOW = tl.constexpr(-1e4)


class Launch(NamedTuple):
    """Launch parameters of one kernel."""

    places: int
    """Elements of a row that a thread takes at a time."""
    num_warps: int
    """Number of warps; the largest, if a whole row is taken at a time."""

    def options(self) -> dict[str, int]:
        """Options of a kernel that takes a row block by block; FMAs are explicit, as Triton's default will change."""
        return {"BLOCK": 32 * self.num_warps * self.places, "num_warps": self.num_warps, "enable_fp_fusion": True}


RESIDENT, STREAMING, STREAMING_WIDE = "resident", "streaming", "streaming wide"
MIX_HIDDEN, SPLIT_GRADIENT = "mix hidden", "split gradient"

# By kernel and architecture. For a streamed row, threads keep two numbers per place; "wide" is with an entropy, which
# needs a third, or with a cap, which takes registers.
LAUNCHES: dict[tuple[str, str], Launch] = {
    (RESIDENT, ANY): Launch(16, 32),
    (STREAMING, ANY): Launch(16, 16),
    (STREAMING_WIDE, ANY): Launch(8, 16),
    (MIX_HIDDEN, ANY): Launch(8, 8),
    (SPLIT_GRADIENT, ANY): Launch(8, 8),
}


@triton.jit
def _at(row, columns):
    """Return pointers arranged so that a thread takes four consecutive logits, 16 bytes.

    The gradient's dtype would make it take eight, and each load of a warp would use half of every sector it touches.
    """
    return tl.max_contiguous(row + columns, 4)


@triton.jit
def _load(row, columns, vocabulary, limit):
    logits = tl.load(_at(row, columns), mask=columns < limit, other=0.0)
    return tl.where(columns < vocabulary, logits, float("-inf"))


@triton.jit
def _difference(logits, top, inverse_temperature):
    """Compute z − largest, limited in size so that its product with 0 is 0."""
    return tl.maximum((logits - top) * inverse_temperature, _FAR_BELOW)


@triton.jit
def _derivative(exponential, excess, logits, top, mean, factor, entropy_factor, inverse_temperature, softcap):
    """Compute the gradient of raw logits, excess · factor, where excess is p (p − 1 at the target) times the total."""
    derivative = excess * factor
    if entropy_factor is not None:
        derivative += exponential * (_difference(logits, top, inverse_temperature) - mean) * entropy_factor
    if softcap is not None:
        part = logits / softcap
        derivative *= tl.maximum(1 - part * part, 0.0)  # 0 for −∞
    return derivative


@triton.jit
def _factor(scale, row, inverse_temperature, total):
    """Return the factor that turns exponentials into a gradient."""
    return tl.load(scale + row) * inverse_temperature / total


@triton.jit
def _store_at_target(gradient, place, derivative):
    """Store the target's gradient, with p − 1 in place of p; the difference is computed before rounding."""
    tl.debug_barrier()  # after the thread that has stored it together with the others
    tl.store(gradient + place, derivative)


@triton.jit
def resident_kernel(
    logits, target, scale, entropy_scale, nll, entropy, gradient, stride, gradient_stride, vocabulary, limit,
    inverse_temperature, softcap, BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one row, read once. Writes no gradient without ``scale``, no entropy without ``entropy``. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, BLOCK)
    place = tl.load(target + row).to(tl.int32)
    at_target = tl.load(logits + place)
    z = _load(logits, columns, vocabulary, limit)
    tl.debug_barrier()  # all threads must read before any writes the gradient into the same memory
    if softcap is not None:
        z, at_target = capped(z, softcap), capped(at_target, softcap)
    top = tl.max(z, 0)
    exponential = tl.exp((z - top) * inverse_temperature)
    total = tl.sum(exponential, 0)
    target_difference = (at_target - top) * inverse_temperature
    tl.store(nll + row, tl.log(total) - target_difference)
    mean = 0.0
    if entropy is not None:
        mean = tl.sum(exponential * _difference(z, top, inverse_temperature), 0) / total
        tl.store(entropy + row, tl.log(total) - mean)
    if scale is not None:
        gradient += row * gradient_stride
        factor = _factor(scale, row, inverse_temperature, total)
        entropy_factor = None
        if entropy_scale is not None:
            entropy_factor = _factor(entropy_scale, row, inverse_temperature, total)
        derivative = _derivative(
            exponential, exponential, z, top, mean, factor, entropy_factor, inverse_temperature, softcap
        )  # fmt: skip
        tl.store(_at(gradient, columns), derivative, mask=columns < limit)
        exponential = tl.exp(target_difference)
        derivative = _derivative(
            exponential, exponential - total, at_target, top, mean, factor, entropy_factor, inverse_temperature, softcap
        )  # fmt: skip
        _store_at_target(gradient, place, derivative)


@triton.jit
def streaming_kernel(
    logits, target, scale, entropy_scale, nll, entropy, gradient, stride, gradient_stride, vocabulary, limit,
    inverse_temperature, softcap, BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one row of any length, read twice, or without ``scale`` once and without a gradient. Grid: rows.

    Each of BLOCK places keeps its own running maximum and sum of exponentials, so threads synchronise once per row, not
    once per block. Whichever of maximum and logit is larger, one exponential rescales the other.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    place = tl.load(target + row).to(tl.int32)
    at_target = tl.load(logits + place)
    if softcap is not None:
        at_target = capped(at_target, softcap)
    peak = tl.full((BLOCK,), _LOWEST, tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    moments = tl.zeros((BLOCK,), tl.float32)  # Σ (z − peak) exp(z − peak)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=3):
        z = _load(logits, start + tl.arange(0, BLOCK), vocabulary, limit)
        if softcap is not None:
            z = capped(z, softcap)
        smaller = tl.exp(-tl.abs(z - peak) * inverse_temperature)
        if entropy is not None:
            apart = _difference(tl.minimum(z, peak), tl.maximum(z, peak), inverse_temperature)
            moments = tl.where(z > peak, (moments + totals * apart) * smaller, moments + smaller * apart)
        totals = tl.where(z > peak, totals * smaller + 1, totals + smaller)
        peak = tl.maximum(peak, z)
    top = tl.max(peak, 0)
    total = tl.sum(totals * tl.exp((peak - top) * inverse_temperature), 0)
    target_difference = (at_target - top) * inverse_temperature
    tl.store(nll + row, tl.log(total) - target_difference)
    mean = 0.0
    if entropy is not None:
        moments += totals * _difference(peak, top, inverse_temperature)
        mean = tl.sum(moments * tl.exp((peak - top) * inverse_temperature), 0) / total
        tl.store(entropy + row, tl.log(total) - mean)
    if scale is not None:
        gradient += row * gradient_stride
        factor = _factor(scale, row, inverse_temperature, total)
        entropy_factor = None
        if entropy_scale is not None:
            entropy_factor = _factor(entropy_scale, row, inverse_temperature, total)
        blocks = tl.cdiv(vocabulary, BLOCK)
        for done in tl.range(0, blocks, num_stages=1):  # from the end, which is still in the L2 cache
            columns = (blocks - 1 - done) * BLOCK + tl.arange(0, BLOCK)
            z = _load(logits, columns, vocabulary, limit)
            if softcap is not None:
                z = capped(z, softcap)
            exponential = tl.exp((z - top) * inverse_temperature)
            tl.debug_barrier()  # the gradient, half as wide, overwrites logits of this block and later ones
            derivative = _derivative(
                exponential, exponential, z, top, mean, factor, entropy_factor, inverse_temperature, softcap
            )  # fmt: skip
            tl.store(_at(gradient, columns), derivative, mask=columns < limit)
        exponential = tl.exp(target_difference)
        derivative = _derivative(
            exponential, exponential - total, at_target, top, mean, factor, entropy_factor, inverse_temperature, softcap
        )  # fmt: skip
        _store_at_target(gradient, place, derivative)


def cross_entropy_rows(
    logits: Tensor,
    softmax: Softmax,
    target: Tensor,
    scales: Scales | None,
    entropy: bool,
    gradient_dtype: torch.dtype,
) -> RowResult:
    """Compute nll and entropy of every row and overwrite its logits with their gradient: see ``.chunks.RowKernel``."""
    rows, vocabulary = logits.shape
    if softmax.suppress is not None:
        logits.index_fill_(1, softmax.suppress, float("-inf"))
    nll, entropies = logits.new_empty(rows), logits.new_empty(rows) if entropy else None
    nll_scale, entropy_scale = (None, None) if scales is None else scales
    aligned = logits.stride(0) % _ALIGNMENT == 0
    limit = triton.cdiv(vocabulary, _ALIGNMENT) * _ALIGNMENT if aligned else vocabulary
    # The gradient then needs both logits and exponentials, which would not fit the registers for longer rows.
    longest = _LONGEST_RESIDENT if softmax.softcap is None and entropy_scale is None else _LONGEST_RESIDENT // 4
    if vocabulary <= longest:
        kernel, launch = resident_kernel, row_for(LAUNCHES, RESIDENT, logits)
        block = max(triton.next_power_of_2(vocabulary), 512)
        options = launch._replace(num_warps=min(max(block // (32 * launch.places), 4), launch.num_warps)).options()
        options["BLOCK"] = block
    else:
        kernel, plain = streaming_kernel, softmax.softcap is None and not entropy
        options = row_for(LAUNCHES, STREAMING if plain else STREAMING_WIDE, logits).options()
    # If a row is processed from its end, a gradient half as wide is stored in the second half of the row.
    halved = kernel is streaming_kernel and gradient_dtype.itemsize < logits.element_size()
    first = vocabulary // _ALIGNMENT * _ALIGNMENT if halved else 0
    gradient = logits.view(gradient_dtype)[:, first : first + vocabulary]
    kernel[(rows,)](
        logits, target, nll_scale, entropy_scale, nll, entropies, gradient, logits.stride(0), gradient.stride(0),
        vocabulary, limit, 1 / softmax.temperature, softmax.softcap, **options,
    )  # fmt: skip
    return RowResult(nll, entropies, None if scales is None else gradient)


solve_chunk = chunk_solver(cross_entropy_rows)


@triton.jit
def _load_pair(base, thought, index, row, columns, inside, base_strides, thought_strides):
    """Load elements of a row of thought, and of the row of base that it is mixed with, in float32."""
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
    """Compute a block of a row of the mix, [rows, H] contiguous, for rows from ``first_row`` on. Grid: rows, blocks."""
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
    """Compute those gradients of base, thought and weight that are not None from that of a row of the mix. Grid: rows.

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


class MixedHidden(inputs.MixedHidden):
    """Like the class in ``inputs.py``, with Triton kernels. Rows given by number, as on a CPU only, use the library."""

    def __init__(self, *arguments: object):
        super().__init__(*arguments)
        self.weight, self.gradient_weight = self.weight.contiguous(), self.gradient_weight.contiguous()
        self.index = None if self.index is None else self.index.contiguous()

    def read(self, rows: inputs.Rows) -> Tensor:
        if isinstance(rows, Tensor):
            return super().read(rows)
        count, hidden_size = rows.stop - rows.start, self.thought.shape[1]
        mixed = self.thought.new_empty(count, hidden_size)
        options = row_for(LAUNCHES, MIX_HIDDEN, mixed).options()
        mix_hidden_kernel[(count, triton.cdiv(hidden_size, options["BLOCK"]))](
            self.base, self.thought, self.weight, self.index, mixed, rows.start,
            self.base.stride(), self.thought.stride(), hidden_size, **options,
        )  # fmt: skip
        return mixed

    def write_gradient(self, rows: inputs.Rows, d_mixed: Tensor) -> None:
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
            self.base.stride(), self.thought.stride(), d_mixed.shape[1],
            **row_for(LAUNCHES, SPLIT_GRADIENT, d_mixed).options(),
        )  # fmt: skip
        if repeats:
            self._add_to_base(rows, d_mixed)
