"""Gradient of the queries of thought attention for Hopper in Gluon: ``triton_backward_query``, its products overlapped.

A program has a tile of 128 packed rows, 64 to each of two groups of four warps. They keep dQ in registers, and for the
main loop queries too: wgmma with 64 keys and both operands in shared memory takes all that this can deliver. A warp of
its own brings the base keys and values that all rows of the tile see in full, by TMA, to a ring in shared memory;
mbarriers say when a block is there and when both groups are done with it. While a group is at the exponentials of block
i, tensor cores have its dP(i) = dO · V(i)ᵀ and dQ += dS(i − 1) · K(i − 1) to do:

    tensor cores   S(i) ── dP(i) ── dQ += dS(i − 1) · K(i − 1)      S(i + 1) ── …
    the others             P(i) = exp2(S(i)) ── dS(i) = P(i) · dP(i) ┘

Masked blocks, of edges and of thought keys, come one at a time, to memory of each group, by copies that leave out what
no row sees: with the formulas of ``triton_tiles``, as in Triton. The row tables are those of ``triton_backward_query``.
"""

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

from quietstar.ops.thought_attention import triton_launch
from quietstar.ops.thought_attention.gluon_copies import (
    EDGE_N,
    HALF,
    again,
    edge_block,
    end_copies,
    first_of,
    length_at,
    pointers_to,
    start_edge,
    start_thoughts,
    thought_columns,
)
from quietstar.ops.thought_attention.inputs import Inputs
from quietstar.ops.thought_attention.triton_tiles import (
    LOG2_E,
    anchor_of,
    base_2,
    base_range,
    curved,
    diagonal_end,
    existing,
    first_of_step,
    original_of,
    owner_of,
    product_scale,
    row_offsets,
    sees_block,
    sees_thought,
    step_of,
    table_rows,
    with_slope,
)

BLOCK_N = gl.constexpr(64)
"""Keys of a block that all rows see: registers hold its two products."""
STAGES = gl.constexpr(3)
"""Blocks of keys and values in the ring: as many as there is room for."""


@gluon.jit
def _known_of(index, place, mask, STEPS: gl.constexpr, GROUP: gl.constexpr, PER_ANCHOR: gl.constexpr):
    """Of the packed rows at ``index``: rows, positions of their anchors, steps, anchors and first base keys."""
    num_rows, num_anchors, length, thought_steps, batch = place
    anchors, _, thought_lengths, key_start, _, step_window = mask
    rows = gl.minimum(index, num_rows - 1)  # a tile's surplus rows repeat the last one and are not stored
    position = rows // (STEPS * GROUP)
    step = step_of(rows, thought_steps, STEPS, GROUP)
    anchor = existing(anchor_of(position, anchors, length), step, length_at(position, thought_lengths)).to(gl.int32)
    first = first_of_step(first_of(position, batch, key_start, num_anchors, PER_ANCHOR), anchor, step, step_window)
    return rows, position, step, anchor, first


@gluon.jit
def _weights(products, visible, log_sum, scale, curve_scale):
    """The factor of dP − delta in dS."""
    scores = curved(products, curve_scale)
    if visible is not None:
        scores = gl.where(visible, scores, float("-inf"))
    return with_slope(gl.exp2(scores * scale - log_sum[:, None]), scores, curve_scale)


@gluon.jit
def _step(dq, q, do, tiles, visible, log_sum, delta, scale, curve_scale, S: gl.constexpr, DS: gl.constexpr):
    """Add what a masked block of keys contributes to dQ, one product after the other."""
    k, v = tiles
    log_sum = gl.convert_layout(log_sum, gl.SliceLayout(1, S))
    delta = gl.convert_layout(delta, gl.SliceLayout(1, S))
    zero = gl.zeros((HALF, k.shape[0]), gl.float32, S)
    products = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(1, deps=[products])
    weight = _weights(products, visible, log_sum, scale, curve_scale)
    dp, weight = warpgroup_mma_wait(0, deps=[dp, weight])
    ds = gl.convert_layout((weight * (dp - delta[:, None])).to(q.dtype), DS)
    dq = warpgroup_mma(ds, k, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq])
    gl.barrier()  # before the next keys take their place
    return dq


@gluon.jit
def _full_blocks(
    dq, q, do, ring, blocks, log_sum, delta, scale, curve_scale, S: gl.constexpr, DS: gl.constexpr
):  # fmt: skip
    """Add what the ``blocks`` of base keys in the ring contribute to dQ."""
    k_ring, v_ring, k_full, v_full, empty = ring
    if blocks > 0:
        zero = gl.zeros((HALF, BLOCK_N), gl.float32, S)
        mbarrier.wait(k_full.index(0), 0)
        mbarrier.wait(v_full.index(0), 0)
        products = warpgroup_mma(q, k_ring.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        dp = warpgroup_mma(do, v_ring.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        products = warpgroup_mma_wait(1, deps=[products])
        weight = _weights(products, None, log_sum, scale, curve_scale)
        mbarrier.wait(k_full.index(1), 0, pred=blocks > 1)
        dp, weight = warpgroup_mma_wait(0, deps=[dp, weight])
        mbarrier.wait(v_full.index(1), 0, pred=blocks > 1)
        ds = gl.convert_layout((weight * (dp - delta[:, None])).to(q.dtype), DS)
        before = 0
        stage = 1
        phase = 0
        for i in range(1, blocks):
            following = gl.where(stage + 1 == STAGES, 0, stage + 1)
            phase = gl.where(following == 0, phase ^ 1, phase)
            products = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            dp = warpgroup_mma(do, v_ring.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            dq = warpgroup_mma(ds, k_ring.index(before), dq, is_async=True)
            products = warpgroup_mma_wait(2, deps=[products])
            weight = _weights(products, None, log_sum, scale, curve_scale)
            # For the next block, and here: the branches keep ptxas from waiting for products before it has to.
            mbarrier.wait(k_full.index(following), phase, pred=i + 1 < blocks)
            dp, weight = warpgroup_mma_wait(1, deps=[dp, weight])
            weight = weight * (dp - delta[:, None])
            mbarrier.wait(v_full.index(following), phase, pred=i + 1 < blocks)
            dq, weight = warpgroup_mma_wait(0, deps=[dq, weight])
            mbarrier.arrive(empty.index(before), count=1)
            ds = gl.convert_layout(weight.to(q.dtype), DS)
            before = stage
            stage = following
        dq = warpgroup_mma(ds, k_ring.index(before), dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq])
    return dq


@gluon.jit
def _producer(arguments, BLOCK_D: gl.constexpr):
    """Bring ``blocks`` of base keys and values from ``begin`` on."""
    key, value, ring, batch, head, begin, blocks = arguments
    k_ring, v_ring, k_full, v_full, empty = ring
    stage = 0
    phase = 1
    for i in range(0, blocks):
        place = [batch, head, begin + i * BLOCK_N, 0]
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(k_full.index(stage), key.nbytes_per_cta)
        tma.async_load(key, place, k_full.index(stage), k_ring.index(stage).reshape([1, 1, BLOCK_N, BLOCK_D]))
        mbarrier.expect(v_full.index(stage), value.nbytes_per_cta)
        tma.async_load(value, place, v_full.index(stage), v_ring.index(stage).reshape([1, 1, BLOCK_N, BLOCK_D]))
        stage = gl.where(stage + 1 == STAGES, 0, stage + 1)
        phase = gl.where(stage == 0, phase ^ 1, phase)


@gluon.jit
def _consumer(
    WHICH: gl.constexpr, rows_of, tables, base, thoughts, place, mask, tile_start, first_row, first_table, anchor_rows,
    bounds, ring, blocks, own, scale, curve_scale,
    STEPS: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr, QUERY_UNIT: gl.constexpr, GRAD_UNIT: gl.constexpr,
    HEAD: gl.constexpr, VALUE_HEAD: gl.constexpr, BLOCK_D: gl.constexpr, DIAGONAL_N: gl.constexpr,
    DIAGONAL_ANCHORS: gl.constexpr, PER_ANCHOR: gl.constexpr, GROUP_ANCHORS: gl.constexpr,
):  # fmt: skip
    """The 64 rows of one group."""
    (
        grad_output, grad_lse, query, output, lse, grad_query, grad_output_stride, grad_lse_stride, query_stride,
        lse_stride,
    ) = rows_of  # fmt: skip
    row_anchor, row_start, row_log_sum, row_delta, row_query, row_grad = tables
    num_rows, _, _, thought_steps, _ = place
    anchors, order, thought_lengths, _, window, step_window = mask
    q_tile = own[0].index(WHICH)
    do_tile = own[1].index(WHICH)
    row_tile = own[2].index(WHICH)
    edge = own[3].index(WHICH), own[4].index(WHICH)
    thought = own[5].index(WHICH), own[6].index(WHICH)
    ROWS: gl.constexpr = STEPS * GROUP
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    EDGE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, EDGE_N, 16])
    THOUGHT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIAGONAL_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    DS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    start = tile_start + WHICH * HALF

    # The first masked keys are on their way while everything of rows is.
    _, end, steps, _, _ = bounds
    if steps > 0:
        start_edge(
            edge_block(0, bounds), edge, base, start, place, mask, end, STEPS, GROUP, HEAD, VALUE_HEAD, BLOCK_D,
            PER_ANCHOR, GROUP_ANCHORS, LOAD,
        )  # fmt: skip
    start_thoughts(0, thought, thoughts, start, place, mask, STEPS, GROUP, HEAD, VALUE_HEAD, BLOCK_D, DIAGONAL_N, LOAD)

    # Queries, dO, delta.
    index = start + gl.arange(0, HALF, gl.SliceLayout(1, LOAD))
    rows = gl.minimum(index, num_rows - 1)
    original = original_of(rows // ROWS, order)
    query_offsets = row_offsets(rows, original, query_stride, STEPS, GROUP)
    grad_offsets = row_offsets(rows, original, grad_output_stride, STEPS, GROUP)
    row = first_row + row_offsets(rows, original, lse_stride, STEPS, GROUP)
    pointers, columns = pointers_to(query, query_offsets, HEAD, BLOCK_D, LOAD)
    q_tile.store(gl.load(pointers, mask=columns, other=0.0))
    pointers, columns = pointers_to(grad_output, grad_offsets, VALUE_HEAD, BLOCK_D, LOAD)
    do = gl.load(pointers, mask=columns, other=0.0)
    do_tile.store(do)
    pointers, columns = pointers_to(output, row * VALUE_HEAD, VALUE_HEAD, BLOCK_D, LOAD)
    o = gl.load(pointers, mask=columns, other=0.0)
    row_tile.store(gl.where(index < num_rows, row, -1))  # for the end: till then registers are short
    delta = gl.convert_layout(gl.sum(do.to(gl.float32) * o.to(gl.float32), 1), ROW)

    # The rest of what is known of rows, and their tables.
    index = start + gl.arange(0, HALF, ROW)
    exists = index < num_rows
    rows, position, step, anchor, first = _known_of(index, place, mask, STEPS, GROUP, PER_ANCHOR)
    original = original_of(position, order)
    query_offsets = row_offsets(rows, original, query_stride, STEPS, GROUP)
    grad_offsets = row_offsets(rows, original, grad_output_stride, STEPS, GROUP)
    log_sum = gl.load(lse + (first_row + row_offsets(rows, original, lse_stride, STEPS, GROUP))) * LOG2_E
    if grad_lse is not None:
        delta -= gl.load(grad_lse + row_offsets(rows, original, grad_lse_stride, STEPS, GROUP))
    if anchors is not None:  # inactive rows: probability 0
        delta = gl.where(anchor < 0, 0.0, delta)
        log_sum = gl.where(anchor < 0, float("inf"), log_sum)
    table = first_table + table_rows(index, position, anchor_rows, ROWS)
    if row_anchor is not None:
        gl.store(row_anchor + table, anchor, mask=exists)
    if row_start is not None:
        gl.store(row_start + table, first, mask=exists)
    gl.store(row_log_sum + table, log_sum, mask=exists)
    gl.store(row_delta + table, delta, mask=exists)
    gl.store(row_query + table, query_offsets // QUERY_UNIT, mask=exists)
    if row_grad is not None:
        gl.store(row_grad + table, grad_offsets // GRAD_UNIT, mask=exists)

    # The masked base keys, then the thought keys: as of a tile of 64 rows that is not divided.
    dq = gl.zeros((HALF, BLOCK_D), gl.float32, ACC)
    row_scale = base_2(scale)
    edge_anchor = gl.convert_layout(anchor, gl.SliceLayout(1, EDGE))
    edge_first = first
    if len(first.shape) > 0:
        edge_first = gl.convert_layout(first, gl.SliceLayout(1, EDGE))
    for i in range(0, steps):
        end_copies()
        keys = edge_block(i, bounds) + gl.arange(0, EDGE_N, gl.SliceLayout(0, EDGE))
        visible = sees_block(edge_anchor, keys, edge_first, window)
        dq = _step(dq, q_tile, do_tile, edge, visible, log_sum, delta, row_scale, curve_scale, EDGE, DS)
        if i + 1 < steps:
            start_edge(
                edge_block(i + 1, bounds), edge, base, start, place, mask, end, STEPS, GROUP, HEAD, VALUE_HEAD,
                BLOCK_D, PER_ANCHOR, GROUP_ANCHORS, LOAD,
            )  # fmt: skip
    columns = diagonal_end(
        index, position, anchor, step, length_at(position, thought_lengths), thought_steps, ROWS, HALF,
        DIAGONAL_ANCHORS, CAUSAL,
    )  # fmt: skip
    row_position = gl.convert_layout(position, gl.SliceLayout(1, THOUGHT))[:, None]
    row_step = gl.convert_layout(step, gl.SliceLayout(1, THOUGHT))[:, None]
    for chunk in range(0, columns, DIAGONAL_N):
        end_copies()
        key_column = chunk + gl.arange(0, DIAGONAL_N, gl.SliceLayout(0, THOUGHT))
        key_position, key_step, near = thought_columns(key_column, start, place, mask, ROWS)
        owner = owner_of(key_position, key_step, length_at(near, thought_lengths), CAUSAL)[None, :]
        visible = sees_thought(owner, key_step[None, :], row_position, row_step, step_window, CAUSAL)
        dq = _step(dq, q_tile, do_tile, thought, visible, log_sum, delta, row_scale, curve_scale, THOUGHT, DS)
        if chunk + DIAGONAL_N < columns:
            start_thoughts(
                chunk + DIAGONAL_N, thought, thoughts, start, place, mask, STEPS, GROUP, HEAD, VALUE_HEAD, BLOCK_D,
                DIAGONAL_N, LOAD,
            )  # fmt: skip
    end_copies()  # those that no step has waited for, and queries and dO where there was no step at all

    q = q_tile.load(gl.DotOperandLayout(0, S, 2))
    dq = _full_blocks(dq, q, do_tile, ring, blocks, log_sum, delta, row_scale, curve_scale, S, DS)

    dq = dq * product_scale(scale, curve_scale)
    if anchors is not None:
        inactive = gl.convert_layout(log_sum, gl.SliceLayout(1, ACC)) == float("inf")
        dq = gl.where(inactive[:, None], 0.0, dq)
    row = row_tile.load(gl.SliceLayout(1, ACC))
    pointers, columns = pointers_to(grad_query, row * HEAD, HEAD, BLOCK_D, ACC)
    gl.store(pointers, dq.to(q.dtype), mask=columns & (row >= 0)[:, None])
    if WHICH == 0:  # or LLVM would join the ends of both groups, with the numbers of barriers in registers
        again(steps)


@gluon.jit
def _consumer_0(arguments, sizes: gl.constexpr):
    _consumer(0, *arguments, *sizes)


@gluon.jit
def _consumer_1(arguments, sizes: gl.constexpr):
    _consumer(1, *arguments, *sizes)


@gluon.jit(do_not_specialize=["num_anchors", "length", "thought_steps", "window", "step_window"])
def gluon_query_gradient_kernel(
    key_blocks, value_blocks,
    grad_output, grad_lse, query, key, value, thought_key, thought_value, output, lse, anchors, order, thought_lengths,
    key_start, anchor_rows,
    grad_query, row_anchor, row_start, row_log_sum, row_delta, row_query, row_grad,
    grad_output_stride, grad_lse_stride, query_stride, key_stride, value_stride, thought_key_stride,
    thought_value_stride, lse_stride, anchors_stride,
    kv_heads, num_anchors, length, thought_steps, window, step_window, scale, curve_scale,
    STEPS: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr, QUERY_UNIT: gl.constexpr, GRAD_UNIT: gl.constexpr,
    PER_ANCHOR: gl.constexpr, HEAD: gl.constexpr, VALUE_HEAD: gl.constexpr, BLOCK_D: gl.constexpr,
    DIAGONAL_N: gl.constexpr, DIAGONAL_ANCHORS: gl.constexpr, GROUP_ANCHORS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As ``query_gradient_kernel``; ``key_blocks`` and ``value_blocks`` are TMA descriptors of base keys and values.

    DIAGONAL_ANCHORS and GROUP_ANCHORS, a power of two, suffice for the rows of a group. Grid: tiles · B · Hkv programs.
    """
    BLOCK_M: gl.constexpr = 2 * HALF
    dtype: gl.constexpr = query.dtype.element_ty
    # Both are handed on to the other warps, which else compute them again, long before they need them.
    num_rows = again(num_anchors * STEPS * GROUP)
    program = again(gl.program_id(0))
    num_tiles = gl.cdiv(num_rows, BLOCK_M)
    tile_start = (num_tiles - 1 - program % num_tiles) * BLOCK_M  # the longest rows first, for an even end
    batch = (program // num_tiles // kv_heads).to(gl.int64)
    head = (program // num_tiles % kv_heads).to(gl.int64)

    grad_output += batch * grad_output_stride[0] + head * GROUP * grad_output_stride[1]
    query += batch * query_stride[0] + head * GROUP * query_stride[1]
    key += batch * key_stride[0] + head * key_stride[1]
    value += batch * value_stride[0] + head * value_stride[1]
    thought_key += batch * thought_key_stride[0] + head * thought_key_stride[1]
    thought_value += batch * thought_value_stride[0] + head * thought_value_stride[1]
    first_row = batch * lse_stride[0] + head * GROUP * lse_stride[1]
    if grad_lse is not None:
        grad_lse += batch * grad_lse_stride[0] + head * GROUP * grad_lse_stride[1]
    if anchors is not None:
        anchors += batch * anchors_stride
    if order is not None:
        order += batch * anchors_stride
    if thought_lengths is not None:
        thought_lengths += batch * anchors_stride
        anchor_rows += batch * (num_anchors + 1)

    place = num_rows, num_anchors, length, thought_steps, batch
    mask = anchors, order, thought_lengths, key_start, window, step_window
    index = tile_start + gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [4], [0]))
    _, _, _, anchor, first = _known_of(index, place, mask, STEPS, GROUP, PER_ANCHOR)
    full_begin, full_end, begin, end, steps, hole_at, hole = base_range(
        anchor, first, window, length, 0, 1, BLOCK_N, EDGE_N
    )
    blocks = gl.maximum(full_end - full_begin, 0) // BLOCK_N

    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], LAYOUT)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], LAYOUT)
    own = (
        gl.allocate_shared_memory(dtype, [2, HALF, BLOCK_D], LAYOUT),
        gl.allocate_shared_memory(dtype, [2, HALF, BLOCK_D], LAYOUT),
        gl.allocate_shared_memory(gl.int64, [2, HALF], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(dtype, [2, EDGE_N, BLOCK_D], LAYOUT),
        gl.allocate_shared_memory(dtype, [2, EDGE_N, BLOCK_D], LAYOUT),
        gl.allocate_shared_memory(dtype, [2, DIAGONAL_N, BLOCK_D], LAYOUT),
        gl.allocate_shared_memory(dtype, [2, DIAGONAL_N, BLOCK_D], LAYOUT),
    )
    k_full = mbarrier.allocate_mbarrier(batch=STAGES)
    v_full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()

    ring = k_ring, v_ring, k_full, v_full, empty
    arguments = (
        (
            grad_output, grad_lse, query, output, lse, grad_query, grad_output_stride, grad_lse_stride, query_stride,
            lse_stride,
        ),
        (row_anchor, row_start, row_log_sum, row_delta, row_query, row_grad),
        (key, value, key_stride, value_stride),
        (thought_key, thought_value, thought_key_stride, thought_value_stride),
        place, mask, tile_start, first_row, (batch * kv_heads + head) * num_rows, anchor_rows,
        (begin, end, steps, hole_at, hole), ring, blocks, own, scale, curve_scale,
    )  # fmt: skip
    sizes: gl.constexpr = (
        STEPS, GROUP, CAUSAL, QUERY_UNIT, GRAD_UNIT, HEAD, VALUE_HEAD, BLOCK_D, DIAGONAL_N, DIAGONAL_ANCHORS,
        PER_ANCHOR, GROUP_ANCHORS,
    )  # fmt: skip
    producer = key_blocks, value_blocks, ring, batch.to(gl.int32), head.to(gl.int32), full_begin, blocks
    gl.warp_specialize(  # the producer first: the part that Triton starts with may have the fewest registers
        [(_producer, (producer, BLOCK_D)), (_consumer_0, (arguments, sizes)), (_consumer_1, (arguments, sizes))],
        [4, 4],
        [240, 240],
    )


def launch(arguments: tuple, vectors: Inputs, **sizes: int) -> None:
    """Launch ``gluon_query_gradient_kernel``.

    Args:
        arguments: those that ``query_gradient_kernel`` takes, too.
        vectors: some that it is available for.
        sizes: STEPS, GROUP, CAUSAL, QUERY_UNIT, GRAD_UNIT, PER_ANCHOR.
    """
    query, key, value, thought_key, _ = vectors
    batch, kv_heads, _, head = key.shape
    rows = sizes["STEPS"] * sizes["GROUP"]
    anchors = triton_launch.most_anchors(rows, HALF.value)
    block_d = max(64, triton_launch.padded_head(max(head, value.shape[-1])))
    columns = min(EDGE_N.value, triton_launch.power_of_2(anchors * thought_key.shape[3]))
    tiles = triton.cdiv(query.shape[2] * rows, 2 * HALF.value)
    gluon_query_gradient_kernel[(batch * kv_heads * tiles,)](
        _blocks(key, block_d), _blocks(value, block_d), *arguments, **sizes,
        HEAD=head, VALUE_HEAD=value.shape[-1], BLOCK_D=block_d, DIAGONAL_N=max(16, columns), DIAGONAL_ANCHORS=anchors,
        GROUP_ANCHORS=triton_launch.power_of_2(anchors), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _blocks(tensor: Tensor, block_d: int) -> TensorDescriptor:
    """Of base keys or values [B, Hkv, L, D], in blocks of BLOCK_N of one head; what is beyond L and D are zeros."""
    *sizes, head = tensor.shape
    strides = [stride if size > 1 else head for size, stride in zip(sizes, tensor.stride()[:-1], strict=True)]
    layout = gl.NVMMASharedLayout(128, 16, 4)
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, BLOCK_N.value, block_d], layout)
