"""The candidates of ``python -m quietstar.ops.tune`` for thought attention: tiles that fit the device."""

import itertools
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quietstar.ops._tuning import Subject
from quietstar.ops.thought_attention import backend_triton, gluon_launch, triton_launch
from quietstar.ops.thought_attention.cost import thought_attention_cost
from quietstar.ops.thought_attention.inputs import Inputs, Mask, ResultGradients
from quietstar.ops.thought_attention.triton_launch import (
    DECODE,
    FORWARD,
    KEY_GRADIENT,
    QUERY_GRADIENT,
    TILES,
    Tile,
    padded_head,
    row_key,
    tile_for,
)

if TYPE_CHECKING:
    from quietstar.ops.tune import Sizes

KERNELS = (FORWARD, DECODE, QUERY_GRADIENT, KEY_GRADIENT)
TABLE = f"{triton_launch.__name__}.TILES"

_REGISTER_BYTES = 32 * 256 * 4  # registers of a warp


def candidates(kernel: str, query: Tensor, shared_memory: int) -> list[Tile]:
    """Return tiles worth timing: blocks fit ``shared_memory`` [bytes], and accumulators half of the registers."""
    vector = padded_head(query.shape[-1])
    rows, keys = (64, 128), (32, 64, 128)
    if kernel == DECODE:
        rows = (64,)  # the launch reduces it to 16 where that is enough
    elif kernel == KEY_GRADIENT:
        rows = keys
    if query.element_size() == 4:
        rows = keys = (16, 32)
    elif vector == 256:
        rows = (32, 64, 128)
    tiles = itertools.starmap(Tile, itertools.product(rows, keys, (4, 8), (1, 2, 3, 4)))

    def fits(tile: Tile) -> bool:
        resident, streamed, sums = tile.block_m, 2 * tile.block_n, tile.block_m  # query; key and value; output
        if kernel == QUERY_GRADIENT:
            resident = 2 * tile.block_m  # query, dO
        elif kernel == KEY_GRADIENT:
            # key, value; query, dO; dK, dV
            resident, streamed, sums = 2 * tile.block_n, 2 * tile.block_m, 2 * tile.block_n
        blocks = (resident + tile.num_stages * streamed) * vector * query.element_size()
        return blocks <= shared_memory and 2 * sums * vector * 4 <= tile.num_warps * _REGISTER_BYTES

    return list(filter(fits, tiles))


def subjects(sizes: "Sizes") -> list[Subject]:
    """Return for every kernel a call that it dominates: decoding for the decoding kernel, training for the others."""
    make = partial(torch.randn, dtype=sizes.dtype, device=sizes.device)

    def inputs(batch: int, anchors: int, queries: int) -> Inputs:
        heads, kv_heads, head_size = sizes.heads, sizes.kv_heads, sizes.head_size
        base = (make(batch, kv_heads, sizes.length, head_size) for _ in range(2))
        own = (make(batch, kv_heads, anchors, sizes.steps, head_size) for _ in range(2))
        return Inputs(make(batch, heads, anchors, queries, head_size), *base, *own)

    training, decoding = inputs(1, sizes.length, sizes.steps), inputs(sizes.decoding, 1, 1)
    anywhere = Mask.of(training)
    last = torch.tensor([sizes.length - 1], device=sizes.device)
    at_the_end = Mask.of(decoding, last)
    result = backend_triton.forward(training, anywhere)
    gradients = ResultGradients(torch.randn_like(result.output), None)
    cost, memory = thought_attention_cost(*training), thought_attention_cost(*decoding, anchors=last).forward
    backward = partial(backend_triton.backward, gradients, training, anywhere, result)
    calls = {
        FORWARD: (training, partial(backend_triton.forward, training, anywhere), {"flops": cost.forward.flops}),
        DECODE: (decoding, partial(backend_triton.forward, decoding, at_the_end), {"moved": memory.bytes}),
        QUERY_GRADIENT: (training, backward, {"flops": cost.backward.flops}),
        KEY_GRADIENT: (training, backward, {"flops": cost.backward.flops}),
    }

    def subject(kernel: str, of: Inputs, run: partial, work: dict[str, float]) -> Subject:
        tiles = candidates(kernel, of.query, sizes.shared_memory)
        function = "forward_kernel" if kernel == DECODE else f"{kernel.replace(' ', '_')}_kernel"
        return Subject(
            TABLE, TILES, row_key(kernel, of.query), function, tile_for(kernel, of.query), tiles, run, **work
        )

    triton = [subject(kernel, *call) for kernel, call in calls.items()]
    if gluon_launch.unavailable(training, anywhere) is not None:
        return triton
    _, run, work = calls[FORWARD]
    return [*triton, _gluon_forward(training.query, run, sizes.shared_memory, **work)]


def gluon_candidates(query: Tensor, shared_memory: int) -> list[gluon_launch.Tile]:
    """Return tiles of the Gluon forward whose queries, and keys and values of all stages, fit ``shared_memory``."""
    tiles = itertools.starmap(gluon_launch.Tile, itertools.product((128,), (32, 64, 128), (1, 2, 3, 4)))
    vector = max(64, padded_head(query.shape[-1])) * query.element_size()
    return [tile for tile in tiles if (tile.block_m + 2 * tile.stages * tile.block_n) * vector <= shared_memory]


def _gluon_forward(query: Tensor, run: partial, shared_memory: int, flops: float) -> Subject:
    table, size = f"{gluon_launch.__name__}.TILES", max(64, padded_head(query.shape[-1]))
    rows, tiles = gluon_launch.TILES, gluon_candidates(query, shared_memory)
    return Subject(table, rows, size, "gluon_forward_kernel", rows[size], tiles, run, flops)
