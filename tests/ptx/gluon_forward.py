"""Thought attention's forward in Gluon for Hopper, a warp-specialised kernel to test the emulator; not the package's.

A producer warp fills rings of STAGES blocks of K and V by TMA; two groups of four warps, 64 rows each, wait for them on
mbarriers and hand them back. Rows are anchor-major with the heads of a key head packed, as in the package's kernels;
block 0 are the thoughts' keys, then come the base keys, the last block first. Within a group Q K(i)^T runs under
P V(i - 1), and the softmax of block i under that; between the groups, turns (mbarriers) let one multiply while the
other is at its softmax.

Limits: anchors are positions in ascending order, all active; no window, no padding; D is BLOCK_D; the thoughts' keys of
a tile fit into one block (``forward`` checks that). A box that ends beyond its batch reads the next one's keys, which
are masked: values there must be finite.
"""

import torch
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

LOWEST = gl.constexpr(-1e30)
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _blocks(anchors, tile_start, num_rows, length, ROWS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Blocks of base keys of a tile: those that all of its rows see, and all of them."""
    low = tile_start // ROWS
    high = gl.minimum(tile_start + BLOCK_M - 1, num_rows - 1) // ROWS
    if anchors is not None:
        low = gl.minimum(gl.load(anchors + low), length - 1).to(gl.int32)
        high = gl.minimum(gl.load(anchors + high), length - 1).to(gl.int32)
    return (low + 1) // BLOCK_N, (high + BLOCK_N) // BLOCK_N


@gluon.jit
def _producer(
    key, value, thought_key, thought_value, k_ring, v_ring, k_full, v_full, k_empty, v_empty,
    key_row, column, thought_row, blocks, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for i in range(0, blocks + 1):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        row = key_row + (blocks - i) * BLOCK_N
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), key.nbytes_per_cta)
        if i == 0:
            tma.async_load(thought_key, [thought_row, column], k_full.index(stage), k_ring.index(stage))
        else:
            tma.async_load(key, [row, column], k_full.index(stage), k_ring.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), key.nbytes_per_cta)
        if i == 0:
            tma.async_load(thought_value, [thought_row, column], v_full.index(stage), v_ring.index(stage))
        else:
            tma.async_load(value, [row, column], v_full.index(stage), v_ring.index(stage))


@gluon.jit
def _softmax(scores, peak, total, scale):
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale)
    probability = gl.exp2(scores * scale - gl.expand_dims(new_peak, 1))
    shrink = gl.exp2(peak - new_peak)
    return probability, shrink, new_peak, total * shrink + gl.sum(probability, 1)


@gluon.jit
def _step(
    i, last_key, acc, p, peak, total, q, k_ring, v_ring, k_full, v_full, k_empty, v_empty, my_turn, other_turn,
    anchor, scale, MASKED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of block i and, meanwhile, the product of probabilities and values of block i - 1.

    V(i - 1) is there: the step before has waited for it, behind its softmax, where the branch of the wait keeps ptxas
    from moving ``warpgroup_mma_wait(0)`` in front of the exponentials.
    """
    stage = i % STAGES
    before = (i - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
    mbarrier.wait(my_turn, i & 1)
    zero = gl.zeros((HALF, BLOCK_N), gl.float32, S_LAYOUT)
    s = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_ring.index(before), acc, is_async=True)
    mbarrier.arrive(other_turn, count=1)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(stage), count=1)
    if MASKED:
        keys = last_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
        s = gl.where(gl.expand_dims(keys, 0) <= gl.expand_dims(anchor, 1), s, float("-inf"))
    probability, shrink, peak, total = _softmax(s, peak, total, scale)
    mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)
    acc, probability = warpgroup_mma_wait(0, deps=[acc, probability])
    mbarrier.arrive(v_empty.index(before), count=1)
    p = gl.convert_layout(probability.to(p.dtype), P_LAYOUT)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout)), 1)
    return acc, p, peak, total


@gluon.jit
def _consumer(
    WHICH: gl.constexpr, query, output, lse, anchors, q_tile, k_ring, v_ring, k_full, v_full, k_empty, v_empty, turns,
    query_anchor_stride, query_step_stride, query_head_stride, out_anchor_stride, out_step_stride, out_head_stride,
    tile_start, num_rows, num_anchors, thought_steps, length, full, blocks, scale,
    STEPS: gl.constexpr, GROUP: gl.constexpr, BLOCK_D: gl.constexpr, HALF: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = STEPS * GROUP
    dtype: gl.constexpr = query.dtype.element_ty
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    my_turn = turns.index(WHICH)
    other_turn = turns.index(1 - WHICH)

    # Queries: gathered once, to shared memory.
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    index = tile_start + WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(1, LOAD))
    rows = gl.minimum(index, num_rows - 1)
    column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LOAD))
    offsets = (rows // ROWS).to(gl.int64) * query_anchor_stride + (rows // GROUP % STEPS) * query_step_stride
    offsets = offsets + (rows % GROUP) * query_head_stride
    q = q_tile.index(WHICH)
    q.store(gl.load(query + gl.expand_dims(offsets, 1) + gl.expand_dims(column, 0)))
    fence_async_shared()
    gl.barrier()

    index = tile_start + WHICH * HALF + gl.arange(0, HALF, ROW)
    rows = gl.minimum(index, num_rows - 1)
    position = rows // ROWS
    anchor = position
    if anchors is not None:
        anchor = gl.minimum(gl.load(anchors + position), length - 1).to(gl.int32)
    peak = gl.full((HALF,), LOWEST, gl.float32, ROW)
    total = gl.zeros((HALF,), gl.float32, ROW)
    acc = gl.zeros((HALF, BLOCK_D), gl.float32, O_LAYOUT)

    # The thoughts' keys: each row sees those of its own anchor, up to its step.
    mbarrier.wait(k_full.index(0), 0)
    mbarrier.wait(my_turn, 0)
    zero = gl.zeros((HALF, BLOCK_N), gl.float32, S_LAYOUT)
    s = warpgroup_mma(q, k_ring.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.arrive(other_turn, count=1)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(0), count=1)
    keys = gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
    key_position = tile_start // ROWS + keys // thought_steps
    row_step = rows // GROUP % STEPS + (thought_steps - STEPS)
    visible = gl.expand_dims(key_position, 0) == gl.expand_dims(position, 1)
    visible = visible & (gl.expand_dims(keys % thought_steps, 0) <= gl.expand_dims(row_step, 1))
    probability, _, peak, total = _softmax(gl.where(visible, s, float("-inf")), peak, total, scale)
    p = gl.convert_layout(probability.to(dtype), P_LAYOUT)
    mbarrier.wait(v_full.index(0), 0)

    # The base keys: the masked edge, then full blocks.
    masked = blocks - full
    for i in range(1, masked + 1):
        acc, p, peak, total = _step(
            i, (blocks - i) * BLOCK_N, acc, p, peak, total, q, k_ring, v_ring, k_full, v_full, k_empty, v_empty,
            my_turn, other_turn, anchor, scale, True, BLOCK_N, STAGES, S_LAYOUT, P_LAYOUT, HALF,
        )  # fmt: skip
    for i in range(masked + 1, blocks + 1):
        acc, p, peak, total = _step(
            i, 0, acc, p, peak, total, q, k_ring, v_ring, k_full, v_full, k_empty, v_empty,
            my_turn, other_turn, anchor, scale, False, BLOCK_N, STAGES, S_LAYOUT, P_LAYOUT, HALF,
        )  # fmt: skip
    acc = warpgroup_mma(p, v_ring.index(blocks % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])

    acc = acc * gl.expand_dims(gl.convert_layout(1 / total, gl.SliceLayout(1, O_LAYOUT)), 1)
    index = tile_start + WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(1, O_LAYOUT))
    column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, O_LAYOUT))
    offsets = (index // ROWS).to(gl.int64) * out_anchor_stride + (index // GROUP % STEPS) * out_step_stride
    offsets = offsets + (index % GROUP) * out_head_stride
    gl.store(
        output + gl.expand_dims(offsets, 1) + gl.expand_dims(column, 0), acc.to(dtype),
        mask=gl.expand_dims(index < num_rows, 1),
    )  # fmt: skip
    index = tile_start + WHICH * HALF + gl.arange(0, HALF, ROW)
    place = (index % GROUP) * num_anchors * STEPS + index // GROUP
    gl.store(lse + place, (peak + gl.log2(total)) * LN_2, mask=index < num_rows)


@gluon.jit
def _consumer_0(
    args, STEPS: gl.constexpr, GROUP: gl.constexpr, BLOCK_D: gl.constexpr, HALF: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _consumer(0, *args, STEPS, GROUP, BLOCK_D, HALF, BLOCK_N, STAGES)


@gluon.jit
def _consumer_1(
    args, STEPS: gl.constexpr, GROUP: gl.constexpr, BLOCK_D: gl.constexpr, HALF: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _consumer(1, *args, STEPS, GROUP, BLOCK_D, HALF, BLOCK_N, STAGES)


@gluon.jit(do_not_specialize=["num_anchors", "length", "thought_steps"])
def gluon_forward_kernel(
    query, key, value, thought_key, thought_value, anchors, output, lse,
    query_batch_stride, query_head_stride, query_anchor_stride, query_step_stride,
    out_batch_stride, out_head_stride, out_anchor_stride, out_step_stride,
    kv_heads, num_anchors, length, thought_steps, scale,
    STEPS: gl.constexpr, GROUP: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Keys and values are TMA descriptors over [B * tokens, Hkv * D]. Grid: tiles * B * Hkv, the longest first."""
    ROWS: gl.constexpr = STEPS * GROUP
    HALF: gl.constexpr = BLOCK_M // 2
    dtype: gl.constexpr = query.dtype.element_ty
    num_rows = num_anchors * ROWS
    num_tiles = gl.cdiv(num_rows, BLOCK_M)
    program = gl.program_id(0)
    tile_start = (num_tiles - 1 - program // kv_heads % num_tiles) * BLOCK_M
    head = program % kv_heads
    batch = program // kv_heads // num_tiles
    query += batch.to(gl.int64) * query_batch_stride + (head * GROUP).to(gl.int64) * query_head_stride
    output += batch.to(gl.int64) * out_batch_stride + (head * GROUP).to(gl.int64) * out_head_stride
    lse += (batch * kv_heads + head).to(gl.int64) * GROUP * num_anchors * STEPS
    if anchors is not None:
        anchors += batch * num_anchors
    full, blocks = _blocks(anchors, tile_start, num_rows, length, ROWS, BLOCK_M, BLOCK_N)

    q_tile = gl.allocate_shared_memory(dtype, [2, HALF, BLOCK_D], gl.NVMMASharedLayout(128, 16, 2))
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], key.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], key.layout)
    k_full = mbarrier.allocate_mbarrier(batch=STAGES)
    v_full = mbarrier.allocate_mbarrier(batch=STAGES)
    k_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    v_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    turns = mbarrier.allocate_mbarrier(batch=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)

    arguments = (
        query, output, lse, anchors, q_tile, k_ring, v_ring, k_full, v_full, k_empty, v_empty, turns,
        query_anchor_stride, query_step_stride, query_head_stride, out_anchor_stride, out_step_stride,
        out_head_stride, tile_start, num_rows, num_anchors, thought_steps, length, full, blocks, scale * LOG2_E,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consumer_0, (arguments, STEPS, GROUP, BLOCK_D, HALF, BLOCK_N, STAGES)),
            (_consumer_1, (arguments, STEPS, GROUP, BLOCK_D, HALF, BLOCK_N, STAGES)),
            (
                _producer,
                (
                    key, value, thought_key, thought_value, k_ring, v_ring, k_full, v_full, k_empty, v_empty,
                    batch * length, head * BLOCK_D, batch * num_anchors * thought_steps
                    + tile_start // ROWS * thought_steps, blocks, BLOCK_N, STAGES,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def forward(
    query, key, value, thought_key, thought_value, anchors=None, *, block_n=128, stages=2, registers=240
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse; bfloat16 tensors as the reference takes them, keys and values with tokens before heads.

    Args:
        query: [B, H, P, S, D].
        key, value: [B, L, Hkv, D].
        thought_key, thought_value: [B, P, T, Hkv, D].
        anchors: [B, P] or None, that is 0, 1, ...
        registers: of a thread of the second group of consumers; the first has what the kernel starts with.
    """
    batches, heads, num_anchors, steps, dim = query.shape
    length, kv_heads, thought_steps = key.shape[1], key.shape[2], thought_key.shape[2]
    group, block_m = heads // kv_heads, 128
    most_anchors = -(-(block_m - 1) // (steps * group)) + 1  # that rows of a tile belong to
    if most_anchors * thought_steps > block_n:
        raise ValueError(f"the thoughts' keys of a tile must fit into block_n, got {most_anchors * thought_steps} keys")
    output = torch.full((batches, heads, num_anchors, steps, dim), float("nan"), dtype=query.dtype)
    lse = torch.full((batches, heads, num_anchors, steps), float("nan"))
    layout = gl.NVMMASharedLayout.get_default_for([block_n, dim], gl.bfloat16)
    rows = [tensor.reshape(-1, kv_heads * dim) for tensor in (key, value, thought_key, thought_value)]
    descriptors = [TensorDescriptor(x, list(x.shape), list(x.stride()), [block_n, dim], layout) for x in rows]
    tiles = -(-num_anchors * steps * group // block_m)
    gluon_forward_kernel[(tiles * batches * kv_heads,)](
        query, *descriptors, anchors, output, lse, *query.stride()[:4], *output.stride()[:4],
        kv_heads, num_anchors, length, thought_steps, dim**-0.5,
        STEPS=steps, GROUP=group, BLOCK_D=dim, BLOCK_M=block_m, BLOCK_N=block_n, STAGES=stages, REGISTERS=registers,
        num_warps=4,
    )  # fmt: skip
    return output, lse
