"""Backward of thought attention for Hopper in Gluon: gradients of base keys and values, their products overlapped.

It takes the place of ``triton_backward_key.key_gradient_kernel``, with the row tables of the query gradient. A program
has 128 keys, 64 to each of two groups of four warps, which keep dK and dV in registers. A warp of its own brings tiles
of 64 rows (query, dO, log sums and deltas) by TMA to a ring in shared memory; mbarriers say when a tile is there and
when both groups are done with it. Scores are transposed, so that P and dS are operands in registers. In a group

    tensor cores   S(i) ── dP(i) ──────────────── dV += P(i) · dO(i) ── dK += dS(i) · Q(i) ── S(i + 1) ── …
    the others             P(i) = exp2(S(i)) ────── dS(i) = P(i) · dP(i)

and each group fills the gaps of the other. dP starts from −delta, which costs no more than zeros and spares registers.

Rows of all anchors are packed (``triton_tiles``), and where anchors are in their own order, 64 rows are a box for TMA:
the G heads of neighbouring steps. So where the caller's order of anchors is another, the kernel returns at once and
leaves the work to ``key_gradient_kernel``: which of them it is only the GPU knows.

Why not dQ as well, in five products instead of seven: it would have to be added up in memory, in float32, block of keys
behind block of keys for the same bits each time. ``python benchmarks/hopper_products.py`` has the model: in front, the
sum must be made from the thought keys, and behind it be rounded, 2 KB of memory a row and head, which takes as long
as the two products that it saves at L = 2048. With all that favours five, and four blocks of keys at the same rows at a
time, the backward is 0.6 to 0.9 times as fast at L = 512, 1.04 at 2048, 1.19 at 4096, 1.28 at 8192, and with two blocks
at the same rows 0.6, 0.9, 1.0 and 1.06, for 0.5 GB more at L = 2048 and S = 14. Besides, dQ does not fit registers.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quietstar.ops.thought_attention.gluon_launch import gradients_unavailable, readable_by_tma
from quietstar.ops.thought_attention.inputs import Mask
from quietstar.ops.thought_attention.triton_launch import padded_head
from quietstar.ops.thought_attention.triton_order import Order, place_of

# Rows of a tile; keys of a program; tiles that are in shared memory or on their way, 32 KiB each.
BLOCK_M, BLOCK_N, STAGES = 64, 128, 4
# Threads have 168 registers to begin with, so that 504 are to be shared out to three groups of four warps.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24
LOG2_E = gl.constexpr(1.4426950408889634)
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


@gluon.jit
def _below(values, stride, count, bound):
    """How many of ``count`` values, ``stride`` apart, are below ``bound``."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    found = gl.zeros((512,), gl.int32, LAYOUT)
    for i in range(0, count, 512):
        index = i + gl.arange(0, 512, LAYOUT)
        value = gl.load(values + index * stride, mask=index < count, other=2**31 - 1)
        found += (value < bound).to(gl.int32)
    return gl.sum(found, 0)


@gluon.jit
def _turns(tiles, split, splits):
    """How many of ``tiles`` a split takes that begins with tile ``split``, and takes every ``splits``-th from there."""
    return gl.cdiv(gl.maximum(tiles - split, 0), splits)


@gluon.jit
def _tiles_of(
    row_anchor, start_bounds, key_start, batches, batch, table, block, last_key, num_anchors, window, split, splits,
    ROWS: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """The tiles of rows that see a block of keys, and of these the ones of a program; ``_rows_of`` reads it.

        begin    low_end            high    end
          │ masked ┤  full           ├ masked │        full ones are whole tiles
                   └── from here to there ────┘ with a window, or first keys of rows

    Masked ones come first, so that little has to stay in registers besides what the long loop over full ones needs;
    full ones are taken from ``high`` down, so that the blocks of a head read the same rows at the same time. Splits
    take turns.
    """
    begin = gl.minimum(block, num_anchors)
    full = gl.minimum(last_key, num_anchors)
    tail = num_anchors
    end = num_anchors
    if row_anchor is not None:
        begin = _below(row_anchor + table, ROWS, num_anchors, block)
        full = _below(row_anchor + table, ROWS, num_anchors, last_key)
    if start_bounds is not None:
        tail = _below(start_bounds + batch * num_anchors, 1, num_anchors, block + 1)
        end = _below(start_bounds + (batches + batch) * num_anchors, 1, num_anchors, last_key + 1)
    elif window is not None:
        tail = gl.minimum(block + window, num_anchors)
        end = gl.minimum(last_key + window, num_anchors)
        if row_anchor is not None:
            tail = _below(row_anchor + table, ROWS, num_anchors, block + window)
            end = _below(row_anchor + table, ROWS, num_anchors, last_key + window)
    end = gl.maximum(end, begin)
    if key_start is not None:
        end = gl.where(last_key < gl.load(key_start + batch), begin, end)  # all of it is padding
    begin *= ROWS
    end *= ROWS
    high = gl.minimum(gl.maximum(tail * ROWS, begin), end)
    full_tiles = gl.maximum(high - gl.maximum(full * ROWS, begin), 0) // BLOCK_M
    low_end = high - full_tiles * BLOCK_M
    low_tiles = gl.cdiv(low_end - begin, BLOCK_M)
    masked = low_tiles + gl.cdiv(end - high, BLOCK_M)
    return (
        begin, low_end, high, end, low_tiles, masked, split, splits,
        _turns(masked, split, splits), _turns(masked + full_tiles, split, splits),
    )  # fmt: skip


@gluon.jit
def _rows_of(i, tiles, BLOCK_M: gl.constexpr):
    """The first row of the i-th tile of a program, and the end of the rows that count if it is a masked one."""
    begin, low_end, high, end, low_tiles, masked, split, splits, _, _ = tiles
    tile = split + i * splits
    is_low = tile < low_tiles
    row = gl.where(is_low, begin + tile * BLOCK_M, high + (tile - low_tiles) * BLOCK_M)
    return gl.where(tile < masked, row, high - (tile - masked + 1) * BLOCK_M), gl.where(is_low, low_end, end)


@gluon.jit
def _producer(arguments, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr):
    """Fills the ring."""
    query, grad_output, row_log_sum, row_delta, ring, full, empty, batch, head, table, tiles = arguments
    q_ring, do_ring, log_sum_ring, delta_ring = ring
    for i in range(0, tiles[9]):
        stage = i % STAGES
        row, _ = _rows_of(i, tiles, BLOCK_M)
        here = full.index(stage)
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(here, query.nbytes_per_cta + grad_output.nbytes_per_cta + 2 * row_log_sum.nbytes_per_cta)
        tma.async_load(query, [batch, head, row // GROUP, 0, 0], here, q_ring.index(stage))
        tma.async_load(row_delta, [table + row], here, delta_ring.index(stage))
        tma.async_load(grad_output, [batch, head, row // GROUP, 0, 0], here, do_ring.index(stage))
        tma.async_load(row_log_sum, [table + row], here, log_sum_ring.index(stage))


@gluon.jit
def _operand(scores, accumulator, dtype: gl.constexpr):
    """Scores as the left operand, in registers, of a product that is added to an accumulator."""
    return gl.convert_layout(scores.to(dtype), gl.DotOperandLayout(0, accumulator.type.layout, 2))


@gluon.jit
def _step(
    i, dk, dv, k, v, kv_full, ring, full, empty, seen, scale,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Add what the i-th tile contributes to the gradients of a group's keys and values; scores are [keys, rows].

    With a mask dP comes behind it: registers are too few for both.
    """
    stage = i % STAGES
    q_ring, do_ring, log_sum_ring, delta_ring = ring
    q = q_ring.index(stage).reshape([BLOCK_M, dk.shape[1]])
    do = do_ring.index(stage).reshape([BLOCK_M, dv.shape[1]])
    zero = gl.zeros((k.shape[0], BLOCK_M), gl.float32, S)
    mbarrier.wait(full.index(stage), (i // STAGES) & 1)
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    if seen is not None:
        keys, last, first = seen
        s = gl.where(keys <= gl.expand_dims(last, 0), warpgroup_mma_wait(0, deps=[s]), float("-inf"))
        if first is not None:
            s = gl.where(keys >= gl.expand_dims(first, 0), s, float("-inf"))
    minus_delta = zero - gl.expand_dims(delta_ring.index(stage).load(gl.SliceLayout(0, S)), 0)
    minus_delta = warpgroup_mma_wait(1, deps=[minus_delta])  # for nothing; but it is computed before the next fence
    dp = warpgroup_mma(v, do.permute((1, 0)), minus_delta, is_async=True)
    if seen is None:
        s = warpgroup_mma_wait(1, deps=[s])
    log_sum = log_sum_ring.index(stage).load(gl.SliceLayout(0, S))
    probability = gl.exp2(s * scale - gl.expand_dims(log_sum, 0))
    mbarrier.wait(kv_full, 0)  # it is: but a branch, over which ptxas does not hoist the wait for dP
    dp, probability = warpgroup_mma_wait(0, deps=[dp, probability])
    dv = warpgroup_mma(_operand(probability, dv, k.dtype), do, dv, is_async=True)
    ds = probability * dp
    if seen is not None:  # the probability of hidden keys is 0, but the product with their values may be NaN
        ds = gl.where(probability == 0, 0.0, ds)
    dk = warpgroup_mma(_operand(ds, dk, k.dtype), q, dk, is_async=True)
    dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
    mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def _store(pointer, start, keys, rest, vectors, HEAD: gl.constexpr):
    """Store the vectors of ``keys`` of a block that lies from ``start`` on, the first ``rest`` of them."""
    layout: gl.constexpr = vectors.type.layout
    column = gl.expand_dims(gl.arange(0, vectors.shape[1], gl.SliceLayout(0, layout)), 0)
    keys = gl.expand_dims(gl.convert_layout(keys, gl.SliceLayout(1, layout)), 1)
    wanted = (keys < rest) & (column < HEAD)
    gl.store(pointer + start * HEAD + (keys * HEAD + column), vectors.to(pointer.dtype.element_ty), mask=wanted)


@gluon.jit
def _consumer(
    WHICH: gl.constexpr, row_anchor, row_start, key_start, grad_key, grad_value, k_tile, v_tile, kv_full, ring, full,
    empty, tiles, table, block, batch, part, length, window, scale,
    ROWS: gl.constexpr, HEAD: gl.constexpr, VALUE_HEAD: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Gradients of half of a block."""
    HALF: gl.constexpr = k_tile.shape[0] // 2
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    K: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, k_tile.shape[1], 16])
    V: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, v_tile.shape[1], 16])
    k = k_tile.slice(WHICH * HALF, HALF)
    v = v_tile.slice(WHICH * HALF, HALF)
    dk = gl.zeros((HALF, k_tile.shape[1]), gl.float32, K)
    dv = gl.zeros((HALF, v_tile.shape[1]), gl.float32, V)
    base_2 = gl.maximum(scale, 1e-30) * LOG2_E  # see triton_tiles
    mbarrier.wait(kv_full, 0)
    gl.barrier()  # or the loop would have it
    for i in range(0, tiles[8]):
        row, end = _rows_of(i, tiles, BLOCK_M)
        rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, S))
        if row_anchor is None:
            anchor = gl.where(rows < end, rows // ROWS, -1)
        else:
            anchor = gl.load(row_anchor + (table + rows), mask=rows < end, other=-1)
        keys = block + WHICH * HALF + gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(1, S)), 1)
        if row_start is not None:
            seen = keys, anchor, gl.load(row_start + (table + rows), mask=rows < end, other=0)
        elif window is not None:
            seen = keys, anchor, anchor - (window - 1)
        else:
            seen = keys, anchor, row_start
        dk, dv = _step(i, dk, dv, k, v, kv_full, ring, full, empty, seen, base_2, BLOCK_M, STAGES, S)
    for i in range(tiles[8], tiles[9]):
        dk, dv = _step(i, dk, dv, k, v, kv_full, ring, full, empty, None, base_2, BLOCK_M, STAGES, S)
    dk *= scale

    keys = WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(1, K))
    if key_start is not None:  # no row sees padding, so it is enough to drop its gradients
        padding = block + keys < gl.load(key_start + batch)
        dk = gl.where(gl.expand_dims(padding, 1), 0.0, dk)
        padding = gl.convert_layout(padding, gl.SliceLayout(1, V))
        dv = gl.where(gl.expand_dims(padding, 1), 0.0, dv)
    start = part.to(gl.int64) * length + block
    _store(grad_key, start, keys, length - block, dk, HEAD)
    _store(grad_value, start, keys, length - block, dv, VALUE_HEAD)


@gluon.jit
def _consumer_0(arguments, ROWS: gl.constexpr, HEAD: gl.constexpr, VALUE_HEAD: gl.constexpr, BLOCK_M: gl.constexpr,
                STAGES: gl.constexpr):  # fmt: skip
    _consumer(0, *arguments, ROWS, HEAD, VALUE_HEAD, BLOCK_M, STAGES)


@gluon.jit
def _consumer_1(arguments, ROWS: gl.constexpr, HEAD: gl.constexpr, VALUE_HEAD: gl.constexpr, BLOCK_M: gl.constexpr,
                STAGES: gl.constexpr):  # fmt: skip
    _consumer(1, *arguments, ROWS, HEAD, VALUE_HEAD, BLOCK_M, STAGES)


@gluon.jit(do_not_specialize=["num_anchors", "length", "window", "splits", "together"])
def gluon_key_gradient_kernel(
    grad_output, query, key, value, in_order, key_start, start_bounds, row_anchor, row_start, row_log_sum, row_delta,
    grad_key, grad_value, batches, kv_heads, num_anchors, length, window, splits, together, scale,
    ROWS: gl.constexpr, GROUP: gl.constexpr, HEAD: gl.constexpr, VALUE_HEAD: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As ``key_gradient_kernel``; what TMA reads comes as descriptors: query and dO as [B, Hkv, P·S, G, D or Dv].

    Without ``row_anchor`` every base position has an anchor. With ``in_order``, an address, a 0 there says that there
    is nothing to do.
    """
    if in_order is not None and gl.load(in_order) == 0:
        return
    place = place_of(gl.program_id(0), gl.cdiv(length, BLOCK_N), kv_heads, splits, together)
    block = place[0] * BLOCK_N
    batch, head, split = place[1], place[2], place[3]
    table = (batch * kv_heads + head) * num_anchors * ROWS

    k_tile = gl.allocate_shared_memory(key.dtype, key.block_shape, key.layout)
    v_tile = gl.allocate_shared_memory(value.dtype, value.block_shape, value.layout)
    ring = (
        gl.allocate_shared_memory(
            query.dtype, [STAGES, 1, 1, BLOCK_M // GROUP, GROUP, query.block_shape[4]], query.layout
        ),
        gl.allocate_shared_memory(
            query.dtype, [STAGES, 1, 1, BLOCK_M // GROUP, GROUP, grad_output.block_shape[4]], grad_output.layout
        ),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], row_log_sum.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], row_delta.layout),
    )
    kv_full = mbarrier.allocate_mbarrier()
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    mbarrier.expect(kv_full, key.nbytes_per_cta + value.nbytes_per_cta)
    tma.async_load(key, [batch, head, block, 0], kv_full, k_tile)
    tma.async_load(value, [batch, head, block, 0], kv_full, v_tile)

    tiles = _tiles_of(
        row_anchor, start_bounds, key_start, batches, batch, table, block, gl.minimum(block + BLOCK_N, length) - 1,
        num_anchors, window, split, splits, ROWS, BLOCK_M,
    )  # fmt: skip
    part = (split * batches + batch) * kv_heads + head
    consumed = (
        row_anchor, row_start, key_start, grad_key, grad_value, k_tile.reshape([BLOCK_N, key.block_shape[3]]),
        v_tile.reshape([BLOCK_N, value.block_shape[3]]), kv_full, ring, full, empty, tiles, table, block, batch, part,
        length, window, scale,
    )  # fmt: skip
    produced = query, grad_output, row_log_sum, row_delta, ring, full, empty, batch, head, table, tiles
    gl.warp_specialize(
        [
            (_consumer_0, (consumed, ROWS, HEAD, VALUE_HEAD, BLOCK_M, STAGES)),
            (_consumer_1, (consumed, ROWS, HEAD, VALUE_HEAD, BLOCK_M, STAGES)),
            (_producer, (produced, GROUP, BLOCK_M, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def unavailable(grad_output: Tensor, query: Tensor, key: Tensor, mask: Mask) -> str | None:
    """Why this kernel cannot run, in one clause, where ``gluon_launch.unavailable`` has no reason; None if it can."""
    if (reason := gradients_unavailable(query, grad_output)) is not None:
        return reason
    group = query.shape[1] // key.shape[1]
    if BLOCK_M % group:
        return f"needs a power of two, at most {BLOCK_M}, of query heads to each key head, got {group}"
    if mask.softcap is not None:
        return "has no softcap"
    if mask.thought_lengths is not None:
        return "has no thought_lengths"
    if (rows := query.shape[:-1].numel()) > 2**31 - BLOCK_M:
        return f"counts rows in 32 bits, got {rows}"
    for name, tensor in (("query", query), ("the gradient of the output", grad_output)):
        if not _is_packed(tensor):
            return f"needs the steps of {name} as far apart across anchors as within one, got strides {tensor.stride()}"
        if not readable_by_tma(tensor):
            return f"needs vectors of {name} 16 bytes, or a multiple, apart, got strides {tensor.stride()}"
    return None


def launch(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, in_order: Tensor | None, key_start: Tensor | None,
    start_bounds: Tensor | None, row_anchor: Tensor | None, row_start: Tensor | None, row_log_sum: Tensor,
    row_delta: Tensor, grad_key: Tensor, grad_value: Tensor, window: int | None, programs: Order, scale: float,
) -> None:  # fmt: skip
    """Start the kernel, whose arguments these are; ``programs`` is the order of those of ``key_gradient_kernel``."""
    _, batches, kv_heads, length, head = grad_key.shape
    num_anchors, steps = query.shape[2:4]
    group = query.shape[1] // kv_heads
    programs = programs._replace(blocks=triton.cdiv(length, BLOCK_N))
    gluon_key_gradient_kernel[programs.grid](
        _rows(grad_output, kv_heads), _rows(query, kv_heads), _keys(key), _keys(value), in_order, key_start,
        start_bounds, row_anchor, row_start, _table(row_log_sum), _table(row_delta), grad_key, grad_value,
        batches, kv_heads, num_anchors, length, window, programs.splits, programs.together, scale,
        ROWS=steps * group, GROUP=group, HEAD=head, VALUE_HEAD=value.shape[-1],
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, STAGES=STAGES, CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _is_packed(rows: Tensor) -> bool:
    """Whether all steps of all anchors are the same distance apart."""
    anchors, steps = rows.shape[2:4]
    return anchors == 1 or steps == 1 or rows.stride(2) == steps * rows.stride(3)


def _rows(tensor: Tensor, kv_heads: int) -> TensorDescriptor:
    """Query or dO [B, H, P, S, D] as [B, Hkv, P·S, G, D], in boxes of BLOCK_M packed rows."""
    packed = tensor.unflatten(1, (kv_heads, -1)).permute(0, 1, 3, 4, 2, 5).flatten(2, 3)
    group = packed.shape[3]
    return _described(packed, [1, 1, BLOCK_M // group, group, padded_head(tensor.shape[-1])])


def _keys(tensor: Tensor) -> TensorDescriptor:
    """Keys or values, in boxes of BLOCK_N."""
    return _described(tensor, [1, 1, BLOCK_N, padded_head(tensor.shape[-1])])


def _table(table: Tensor) -> TensorDescriptor:
    """A table of rows, in boxes of BLOCK_M."""
    return _described(table, [BLOCK_M])


def _described(tensor: Tensor, box: list[int]) -> TensorDescriptor:
    # That of a dimension of size 1 may be anything, and the driver would refuse it.
    strides = [stride if size > 1 else 8 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    layout = gl.NVMMASharedLayout.get_default_for(box, _DTYPES[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], box, layout)
