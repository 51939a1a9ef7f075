"""``thought_attention`` in the shapes of trainers that build a mask for it today, forward and backward of one layer.

The peers are what these trainers run: base and own keys in one sequence of L + P·T, the queries of all blocks, and a
mask that is new with every batch, since anchors are drawn anew. So building the mask counts, in time and in memory.
EAGLE-3 makes a pass for every step, each with one key more; RLP has all its thoughts at one anchor.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from bench_thought_attention import Inputs, compiled_flex_attention, dense_attention
from comparison import OURS
from measure import DEVICE, own_peak_memory, peak_memory
from peers import FUSED, OUR_TORCH, assert_same_task, present
from shapes import DRAFT_TRAINING, DraftShape
from tolerances import assert_as_accurate
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from quietstar.ops import thought_attention
from quietstar.ops.thought_attention.cost import thought_attention_cost

pytestmark = pytest.mark.usefixtures("memory_kept")

SHAPES = DRAFT_TRAINING[DEVICE]
DENSE, FLEX = "dense-mask SDPA", "FlexAttention"
ROUNDS = 3

Attention = Callable[[Inputs], Tensor]


def random_passes(shape: DraftShape) -> list[Inputs]:
    """The inputs of every pass, with the same base keys and values."""
    make = partial(torch.randn, device=DEVICE, dtype=shape.dtype, requires_grad=True)
    base = [make(shape.batch, shape.kv_heads, shape.length, shape.head_dim) for _ in range(2)]

    def of_anchors(heads: int, steps: int) -> Tensor:
        return make(shape.batch, heads, shape.anchors, steps, shape.head_dim)

    return [
        Inputs(of_anchors(shape.heads, shape.queries), *base, *(of_anchors(shape.kv_heads, steps) for _ in range(2)))
        for steps in shape.steps
    ]


def anchors_of(shape: DraftShape) -> Tensor:
    """All positions; or some, drawn and sorted; or the last one for all thoughts."""
    if shape.anchors == shape.length:
        return torch.arange(shape.length, device=DEVICE)
    if shape.anchors < 32:
        return torch.full((shape.anchors,), shape.length - 1, device=DEVICE)
    chosen = torch.randperm(shape.length - shape.queries, generator=torch.Generator().manual_seed(0))[: shape.anchors]
    return chosen.sort().values.to(DEVICE)


def visible(anchors: Tensor, shape: DraftShape, steps: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Which query sees which key, by their places in one sequence: a ``mask_mod`` of FlexAttention."""

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block, step = query // shape.queries, query % shape.queries + steps - shape.queries
        key_block, key_step = (key - shape.length) // steps, (key - shape.length) % steps
        own = key_block == block
        if shape.causal:
            own = own & (key_step <= step)
        return torch.where(key < shape.length, key <= anchors[block], own)

    return mask


def in_one_sequence(attend: Callable[[Tensor, Tensor, Tensor, int], Tensor], inputs: Inputs) -> Tensor:
    query, key, value, own_key, own_value = inputs
    keys, values = (torch.cat(pair, 2) for pair in ((key, own_key.flatten(2, 3)), (value, own_value.flatten(2, 3))))
    return attend(query.flatten(2, 3), keys, values, own_key.shape[3]).view_as(query)


def candidate(name: str, shape: DraftShape) -> Attention:
    """The one of that name; a mask is built in every call."""
    anchors = anchors_of(shape)

    def dense(query: Tensor, key: Tensor, value: Tensor, steps: int) -> Tensor:
        places = (torch.arange(tensor.shape[2], device=DEVICE) for tensor in (query, key))
        rows, columns = places
        return dense_attention(visible(anchors, shape, steps)(None, None, rows[:, None], columns), query, key, value)

    def flex(query: Tensor, key: Tensor, value: Tensor, steps: int) -> Tensor:
        mask = create_block_mask(
            visible(anchors, shape, steps), None, None, query.shape[2], key.shape[2], DEVICE, _compile=DEVICE == "cuda"
        )
        return compiled_flex_attention()(query, key, value, block_mask=mask, enable_gqa=True)

    if name in (DENSE, FLEX):
        return partial(in_one_sequence, dense if name == DENSE else flex)
    backend = "torch" if name == OUR_TORCH else name
    return lambda inputs: thought_attention(*inputs, anchors=anchors, causal=shape.causal, backend=backend)


def run(attention: Attention, passes: list[Inputs]) -> list[Tensor]:
    """Outputs and gradients, pass by pass, as training has them: the gradients of the base keys add up."""
    outputs = [attention(inputs) for inputs in passes]
    leaves = [*passes[0][1:3], *(tensor for inputs in passes for tensor in (inputs.query, *inputs[3:]))]
    loss = sum(output.float().square().sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def assert_right(shape: DraftShape, passes: list[Inputs]) -> Callable[[str], None]:
    """A function that checks a candidate: ours is about as near to float64 as attention with a dense mask.

    In float64, in which that would not fit, our own library calls are the truth: tests compare them with the oracle.
    """
    base = [tensor.detach().double().requires_grad_() for tensor in passes[0][1:3]]
    own = [[x.detach().double().requires_grad_() for x in (inputs.query, *inputs[3:])] for inputs in passes]
    oracle = run(candidate(OUR_TORCH, shape), [Inputs(query, *base, *keys) for query, *keys in own])
    eager = run(candidate(DENSE, shape), passes)

    def check(name: str) -> None:
        for mine, other, truth in zip(run(candidate(name, shape), passes), eager, oracle, strict=True):
            if name in (DENSE, FLEX):
                assert_same_task("output or gradient", mine, truth)
            else:
                assert_as_accurate(mine, other, truth)

    return check


def memory(name: str, backend: str, runs: Mapping[str, Callable[[], object]]) -> dict[str, int]:
    """Peak bytes, of those that can be told: on a CPU a process that compiles shows the compiler's memory."""
    if DEVICE == "cuda":
        return {label: peak_memory(__file__, run=each) for label, each in runs.items()}
    return {label: peak_memory(__file__, backend if label == OURS else label, name) for label in runs if label != FLEX}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", [backend for backend in FUSED if backend != "cuda"])  # whose backward is another's
def bench_draft_training(backend, name, compare):
    shape = SHAPES[name]
    passes = random_passes(shape)
    try:
        candidate(backend, shape)(passes[0])
    except ValueError as unavailable:
        pytest.skip(str(unavailable))
    check = assert_right(shape, passes)
    check(backend)
    peers, missing = present((DENSE, FLEX, OUR_TORCH), check)
    runs = {who: partial(run, candidate(backend if who == OURS else who, shape), passes) for who in (OURS, *peers)}
    costs = [thought_attention_cost(*inputs, anchors=anchors_of(shape), causal=shape.causal) for inputs in passes]
    peak = memory(name, backend, runs)
    compare(
        runs.pop(OURS),
        runs,
        rounds=ROUNDS,
        promised=shape.target,
        memory=peak,
        flops=sum(part.flops for cost in costs for part in cost),
        dtype=shape.dtype,
        moved=sum(part.bytes for cost in costs for part in cost),
        missing=missing,
        shape=shape,
    )


if __name__ == "__main__":
    shape = SHAPES[sys.argv[2]]
    run(candidate(sys.argv[1], shape), random_passes(shape))
    print(own_peak_memory())
