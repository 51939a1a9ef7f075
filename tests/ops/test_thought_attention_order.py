"""The order of programs keeps the processors of a GPU busy: list scheduling of what a launch would start on an H100.

A program costs as many units as it takes blocks in its loop, and a few more in front of and behind it (``COSTS``). Each
goes to the processor that is free first. The best that could be is an even share of the work without any splits.
"""

import heapq
import itertools

import pytest
import torch
from thought_attention_cases import make_inputs

from quietstar.ops import _launch_table, thought_attention
from quietstar.ops._availability import interpreted

pytest.importorskip("triton")

from quietstar.ops.thought_attention import triton_launch as launch
from quietstar.ops.thought_attention.triton_order import Order, place_of

PROCESSORS, CACHE = 132, 50 << 20
GROUP, KV_HEADS = 4, 8
QUERY = torch.empty(0, 1, 1, 1, 128, dtype=torch.bfloat16)

# Beside its loop: reading what stays, writing results, thought keys. A step of 128 keys (64 in the query gradient, 64
# rows in the key gradient) takes 2,700 cycles (2,000; 3,600), by the issue rates of its machine code. Split, a program
# of the key gradient writes 131,072 bytes in float32, which are then read to be added up, each at 12 bytes a cycle.
BESIDE = {"forward": 2, "query gradient": 3, "key gradient": 4}
SPLIT = 4

# What falls short of 0.9, and the least that it may reach. In all of these there are less than two programs for each
# processor; splits even that out, but what they cost is much of so little work. (In the forward, 128 programs of 3 to 6
# units are one round: processors of the shorter ones wait.)
SHORT = {
    ("forward", 1, 1, 512): 0.66, ("query gradient", 1, 1, 512): 0.63,
    ("key gradient", 14, 1, 512): 0.80, ("key gradient", 14, 2, 512): 0.88,
    ("key gradient", 1, 1, 512): 0.36, ("key gradient", 1, 1, 1024): 0.57, ("key gradient", 1, 1, 2048): 0.83,
    ("key gradient", 1, 2, 512): 0.44, ("key gradient", 1, 2, 1024): 0.74,
}  # fmt: skip


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    monkeypatch.setattr(_launch_table, "architecture", lambda: launch.HOPPER)
    monkeypatch.setattr(launch, "processors", lambda device: PROCESSORS)
    monkeypatch.setattr(launch, "cache_bytes", lambda device: CACHE)


def forward_costs(tile, blocks, length, rows):
    """Steps of each tile's loop, the last tile first: over the keys up to its last anchor."""
    lasts = (min(tile.block_m * (blocks - block), rows) - 1 for block in range(blocks))
    return [(last * length // rows + 1) / tile.block_n for last in lasts]


def key_costs(tile, blocks, length, rows):
    """Steps of each key block's loop: over the rows of all anchors from its first key on."""
    return [(length - block * tile.block_n) * rows / length / tile.block_m for block in range(blocks)]


KERNELS = {
    "forward": (launch.forward_launch, forward_costs),
    "query gradient": (launch.query_gradient_launch, forward_costs),
    "key gradient": (launch.key_gradient_launch, key_costs),
}


def places(order):
    """Of all programs of a launch in turn."""
    return [place_of.fn(i, order.blocks, KV_HEADS, order.splits, order.together) for i in range(order.grid[0])]


def makespan(costs):
    free = [0.0] * PROCESSORS
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


@pytest.mark.parametrize("length", [512, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("steps", [14, 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_processors_are_busy(kernel, steps, batch, length):
    of_kernel, costs_of = KERNELS[kernel]
    heads, rows = batch * KV_HEADS, length * steps * GROUP
    tile, order = of_kernel(QUERY, rows, heads, length)
    steps_of = costs_of(tile, order.blocks, length, rows)
    beside = BESIDE[kernel] + (SPLIT if order.splits > 1 else 0)
    taken = makespan(steps_of[block] / order.splits + beside for block, *_ in places(order))
    best = heads * sum(each + BESIDE[kernel] for each in steps_of) / PROCESSORS
    assert best / taken >= SHORT.get((kernel, steps, batch, length), 0.9)


@pytest.mark.parametrize("sizes", [(3, 5, 1, 2), (4, 2, 3, 24), (1, 1, 1, 0), (7, 12, 2, 5), (2, 7, 4, 6)])
def test_every_program_has_a_place_of_its_own(sizes):
    order = Order.of(*sizes)
    assert order.heads % order.together == 0
    kv_heads = order.together if order.together > 1 else order.heads
    found = [place_of.fn(i, order.blocks, kv_heads, order.splits, order.together) for i in range(order.grid[0])]
    each = itertools.product(range(order.blocks), range(order.heads // kv_heads), range(kv_heads), range(order.splits))
    assert sorted(found) == sorted(each)


@pytest.mark.skipif(not interpreted(), reason="the interpreter tells what each program does")
def test_kernels_take_the_longest_blocks_of_all_heads_first(monkeypatch):
    """Products of each program, in the order of the launch: what is assumed above of blocks and of splits."""
    from triton.runtime.interpreter import interpreter_builder as builder

    launches = []
    start_launch, start_program, dot = builder.set_grid_dim, builder.set_grid_idx, builder.create_dot

    def counted_dot(*arguments):
        launches[-1][-1] += 1
        return dot(*arguments)

    monkeypatch.setattr(builder, "set_grid_dim", lambda *sizes: launches.append([]) or start_launch(*sizes))
    monkeypatch.setattr(builder, "set_grid_idx", lambda *place: launches[-1].append(0) or start_program(*place))
    monkeypatch.setattr(builder, "create_dot", counted_dot)
    monkeypatch.setattr(launch, "SPLIT_ROWS", 48)
    inputs = make_inputs(batch=1, length=96, query_heads=2, kv_heads=2, steps=1, head=16)
    thought_attention(*inputs, backend="triton").sum().backward()
    forward, query, key, _ = launches
    for products, side_by_side in (forward, 2), (query, 2), (key, 2 * 2):  # heads, and two splits
        blocks = [products[i : i + side_by_side] for i in range(0, len(products), side_by_side)]
        assert len(blocks) >= 3
        assert all(max(each) - min(each) <= 4 for each in blocks)  # of a tile of rows, that one split has more
        assert all(sum(longer) >= sum(shorter) for longer, shorter in itertools.pairwise(blocks))
        assert sum(blocks[0]) > sum(blocks[-1])
