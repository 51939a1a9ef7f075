"""Gradients of attention to base keys in Gluon for Hopper, in five products; to test the emulator, not the package's.

A program has 128 keys, 64 for each of two groups of four warps, and goes over tiles of 64 rows that a producer warp
brings by TMA. dK and dV stay in registers. Scores are transposed, so that P and dS are operands in registers; dS goes
to shared memory too, where each group multiplies all of it with half of the columns of K: dQ, which TMA adds to a table
in float32.

Limits: only rows that see all 128 keys; the order in which blocks add to dQ is open; 240 registers do not suffice for
the consumers (ptxas 13.4 spills 168 bytes).
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


@gluon.jit
def _producer(
    query, grad_output, q_ring, do_ring, q_full, do_full, q_empty, do_empty, row, tiles,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for i in range(0, tiles):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(q_empty.index(stage), phase ^ 1)
        mbarrier.expect(q_full.index(stage), query.nbytes_per_cta)
        tma.async_load(query, [row + i * BLOCK_M, 0], q_full.index(stage), q_ring.index(stage))
        mbarrier.wait(do_empty.index(stage), phase ^ 1)
        mbarrier.expect(do_full.index(stage), query.nbytes_per_cta)
        tma.async_load(grad_output, [row + i * BLOCK_M, 0], do_full.index(stage), do_ring.index(stage))


@gluon.jit
def _consumer(
    WHICH: gl.constexpr, grad_query, grad_key, grad_value, row_lse, row_delta, k_tile, v_tile, kv_full, q_ring,
    do_ring, ds_tile, dq_tile, q_full, do_full, q_empty, do_empty, ds_full, ds_empty, row, tiles, block, scale,
    BLOCK_M: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = gl.bfloat16
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    k = k_tile.slice(WHICH * HALF, HALF)
    v = v_tile.slice(WHICH * HALF, HALF)
    my_ds = ds_tile.slice(WHICH * HALF, HALF)
    k_columns = k_tile.slice(WHICH * (D // 2), D // 2, dim=1)
    dk = gl.zeros((HALF, D), gl.float32, ACC)
    dv = gl.zeros((HALF, D), gl.float32, ACC)
    zero = gl.zeros((HALF, BLOCK_M), gl.float32, S)
    dq_zero = gl.zeros((BLOCK_M, D // 2), gl.float32, DQ)
    mbarrier.wait(kv_full, 0)
    for i in range(0, tiles):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        q = q_ring.index(stage)
        do = do_ring.index(stage)
        rows = row + i * BLOCK_M + gl.arange(0, BLOCK_M, COLUMN)
        lse = gl.load(row_lse + rows)
        mbarrier.wait(q_full.index(stage), phase)
        s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(do_full.index(stage), phase)
        dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        probability = gl.exp2(s * scale - gl.expand_dims(lse, 0))
        p = gl.convert_layout(probability.to(dtype), P)
        dp = warpgroup_mma_wait(0, deps=[dp])
        dv = warpgroup_mma(p, do, dv, is_async=True)
        delta = gl.load(row_delta + rows)
        ds = (probability * (dp - gl.expand_dims(delta, 0))).to(dtype)
        mbarrier.wait(ds_empty, (i & 1) ^ 1)
        my_ds.store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_full, count=1)
        dk = warpgroup_mma(gl.convert_layout(ds, P), q, dk, is_async=True)
        dv = warpgroup_mma_wait(1, deps=[dv])
        mbarrier.arrive(do_empty.index(stage), count=1)
        mbarrier.wait(ds_full, i & 1)
        dq = warpgroup_mma(ds_tile.permute((1, 0)), k_columns, dq_zero, use_acc=False, is_async=True)
        dk = warpgroup_mma_wait(1, deps=[dk])
        mbarrier.arrive(q_empty.index(stage), count=1)
        dq = warpgroup_mma_wait(0, deps=[dq])
        mbarrier.arrive(ds_empty, count=1)
        tma.store_wait(0)
        dq_tile.index(WHICH).store(dq)
        fence_async_shared()
        gl.barrier()
        tma.async_atomic_add(grad_query, [row + i * BLOCK_M, WHICH * (D // 2)], dq_tile.index(WHICH))
    tma.store_wait(0)
    index = block + WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(1, ACC))
    column = gl.arange(0, D, gl.SliceLayout(0, ACC))
    offsets = gl.expand_dims(index.to(gl.int64) * D, 1) + gl.expand_dims(column, 0)
    gl.store(grad_key + offsets, dk.to(dtype))
    gl.store(grad_value + offsets, dv.to(dtype))


@gluon.jit
def _consumer_0(args, BLOCK_M: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    _consumer(0, *args, BLOCK_M, HALF, D, STAGES)


@gluon.jit
def _consumer_1(args, BLOCK_M: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    _consumer(1, *args, BLOCK_M, HALF, D, STAGES)


@gluon.jit
def gluon_backward_kernel(
    query, grad_output, key, value, grad_query, row_lse, row_delta, grad_key, grad_value, num_rows, rows_per_key, scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The first five are TMA descriptors; grid: blocks of keys."""
    block = gl.program_id(0) * BLOCK_N
    row = (block + BLOCK_N) * rows_per_key
    tiles = (num_rows - row) // BLOCK_M
    k_tile = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_N, D], key.layout)
    v_tile = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_N, D], key.layout)
    q_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, D], query.layout)
    do_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, D], query.layout)
    ds_tile = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_N, BLOCK_M], gl.NVMMASharedLayout(128, 16, 2))
    dq_tile = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M, D // 2], grad_query.layout)
    kv_full = mbarrier.allocate_mbarrier()
    q_full = mbarrier.allocate_mbarrier(batch=STAGES)
    do_full = mbarrier.allocate_mbarrier(batch=STAGES)
    q_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    do_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    ds_full = mbarrier.allocate_mbarrier()
    ds_empty = mbarrier.allocate_mbarrier()
    mbarrier.init(kv_full, count=1)
    mbarrier.init(ds_full, count=2)
    mbarrier.init(ds_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(do_empty.index(i), count=2)
    fence_async_shared()
    mbarrier.expect(kv_full, 2 * key.nbytes_per_cta)
    tma.async_load(key, [block, 0], kv_full, k_tile)
    tma.async_load(value, [block, 0], kv_full, v_tile)
    arguments = (
        grad_query, grad_key, grad_value, row_lse, row_delta, k_tile, v_tile, kv_full, q_ring, do_ring, ds_tile,
        dq_tile, q_full, do_full, q_empty, do_empty, ds_full, ds_empty, row, tiles, block, scale,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consumer_0, (arguments, BLOCK_M, BLOCK_N // 2, D, STAGES)),
            (_consumer_1, (arguments, BLOCK_M, BLOCK_N // 2, D, STAGES)),
            (
                _producer,
                (
                    query, grad_output, q_ring, do_ring, q_full, do_full, q_empty, do_empty, row, tiles,
                    BLOCK_M, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def backward(query, grad_output, key, value, row_lse, row_delta, scale) -> tuple[torch.Tensor, ...]:
    """Gradients to the queries (float32), to the keys and to the values.

    Args:
        query, grad_output: [rows, 128], bfloat16; the keys before a row come in blocks of 128.
        key, value: [keys, 128], bfloat16, with as many rows to each; a multiple of 128.
        row_lse, row_delta: [rows], float32; the first to base 2.
        scale: of scores, to base 2.
    """
    (rows, dim), keys = query.shape, len(key)
    grad_query, grad_key, grad_value = torch.zeros(rows, dim), torch.empty_like(key), torch.empty_like(value)

    def described(tensor: torch.Tensor, box: list[int], dtype: gl.dtype = gl.bfloat16) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(box, dtype)
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box, layout)

    gluon_backward_kernel[(keys // 128,)](
        *(described(tensor, [64, dim]) for tensor in (query, grad_output)),
        *(described(tensor, [128, dim]) for tensor in (key, value)),
        described(grad_query, [64, dim // 2], gl.float32),
        row_lse, row_delta, grad_key, grad_value, rows, rows // keys, scale,
        BLOCK_M=64, BLOCK_N=128, D=dim, STAGES=2, num_warps=4,
    )  # fmt: skip
    return grad_query, grad_key, grad_value
