"""``thought_attention`` in each backend against one dense-masked library attention over the whole thought tree.

The peer is what a tree pass costs without an op for it: base and thought keys in one sequence of L + P*S, queries of
all P*S thought tokens, a mask of [P*S, L + P*S]. The mask is built beforehand, the concatenation of the keys is timed.
FLOPs counted are of the visible (query, key) pairs only.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from measure import DEVICE, own_peak_memory, peak_memory
from shapes import THOUGHT_ATTENTION
from tolerances import assert_as_accurate
from torch import Tensor
from torch.nn import functional as F

from quietstar.ops import thought_attention
from quietstar.ops._backend import BACKENDS
from quietstar.ops.thought_attention.cost import thought_attention_cost

SHAPE = THOUGHT_ATTENTION[DEVICE]
DENSE = "dense-mask SDPA"
CHECKED_ANCHORS = 64


class Inputs(NamedTuple):
    """Arguments of ``thought_attention`` with an anchor at every position, P = L and T = S."""

    query: Tensor
    key: Tensor
    value: Tensor
    thought_key: Tensor
    thought_value: Tensor


def random_inputs() -> Inputs:
    base = (SHAPE.batch, SHAPE.kv_heads, SHAPE.length, SHAPE.head_dim)
    thoughts = (SHAPE.batch, SHAPE.kv_heads, SHAPE.length, SHAPE.steps, SHAPE.head_dim)
    query = (SHAPE.batch, SHAPE.heads, SHAPE.length, SHAPE.steps, SHAPE.head_dim)
    make = partial(torch.randn, device=DEVICE, dtype=SHAPE.dtype, requires_grad=True)
    return Inputs(*(make(size) for size in (query, base, base, thoughts, thoughts)))


def tree_mask() -> Tensor:
    """Additive [P*S, L + P*S]; additive because a boolean one is slower on the CPU."""
    anchor = torch.arange(SHAPE.length, device=DEVICE).repeat_interleave(SHAPE.steps)
    step = torch.arange(SHAPE.steps, device=DEVICE).repeat(SHAPE.length)
    base = torch.arange(SHAPE.length, device=DEVICE) <= anchor[:, None]
    own = (anchor == anchor[:, None]) & (step <= step[:, None])
    visible = torch.cat([base, own], dim=1)
    return torch.zeros(visible.shape, device=DEVICE, dtype=SHAPE.dtype).masked_fill_(~visible, -torch.inf)


def dense(mask: Tensor, inputs: Inputs) -> Tensor:
    query, key, value, thought_key, thought_value = inputs
    key = torch.cat([key, thought_key.flatten(2, 3)], dim=2)
    value = torch.cat([value, thought_value.flatten(2, 3)], dim=2)
    output = F.scaled_dot_product_attention(query.flatten(2, 3), key, value, attn_mask=mask, enable_gqa=True)
    return output.view_as(query)


def forward(attention: Callable[[Inputs], Tensor], inputs: Inputs, gradient: Tensor) -> None:
    with torch.no_grad():
        attention(inputs)


def forward_and_backward(attention: Callable[[Inputs], Tensor], inputs: Inputs, gradient: Tensor) -> tuple[Tensor, ...]:
    output = attention(inputs)
    return output, *torch.autograd.grad(output, inputs, gradient)


PASSES = {"forward": forward, "forward+backward": forward_and_backward}


def candidate(name: str) -> Callable[[Inputs], Tensor]:
    if name == DENSE:
        return partial(dense, tree_mask())
    return lambda inputs: thought_attention(*inputs, backend=name)


def visible_flops(passes: str, inputs: Inputs) -> int:
    cost = thought_attention_cost(*inputs)
    return cost.forward.flops + (cost.backward.flops if passes == "forward+backward" else 0)


def assert_right(backend: str, inputs: Inputs) -> None:
    """Output and all gradients are about as near to float64 as the peer's.

    The specification can't afford all anchors in float64: some are picked, and only their outputs get a gradient.
    """
    picked = torch.randperm(SHAPE.length, device=DEVICE)[:CHECKED_ANCHORS].sort().values
    gradient = torch.zeros_like(inputs.query)
    gradient[:, :, picked] = torch.randn_like(gradient[:, :, picked])

    def of_picked(name: str, tensor: Tensor) -> Tensor:
        return tensor if name in ("key", "value") else tensor[:, :, picked]

    exact = Inputs(
        *(
            of_picked(name, tensor).detach().double().requires_grad_()
            for name, tensor in zip(Inputs._fields, inputs, strict=True)
        )
    )
    specification = partial(thought_attention, anchors=picked, backend="reference")
    oracle = forward_and_backward(
        lambda tensors: specification(*tensors), exact, of_picked("output", gradient).double()
    )
    ours, eager = (forward_and_backward(candidate(name), inputs, gradient) for name in (backend, DENSE))
    for name, mine, theirs, truth in zip(("output", *Inputs._fields), ours, eager, oracle, strict=True):
        assert_as_accurate(of_picked(name, mine), of_picked(name, theirs), truth, name=name)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])  # which is a dense mask too
def bench_thought_attention(backend, passes, compare):
    inputs = random_inputs()
    try:
        candidate(backend)(Inputs(*(tensor[:, :, :1] for tensor in inputs)))
    except ValueError as unavailable:
        pytest.skip(str(unavailable))
    assert_right(backend, inputs)
    gradient = torch.randn_like(inputs.query)
    runs = {name: partial(PASSES[passes], candidate(name), inputs, gradient) for name in (backend, DENSE)}
    compare(
        runs.pop(backend),
        runs,
        rounds=5,
        promised=SHAPE.target if (backend, passes) == ("torch", "forward") else None,
        memory={name: peak_memory(__file__, them, passes) for name, them in (("ours", backend), (DENSE, DENSE))},
        flops=visible_flops(passes, inputs),
        dtype=SHAPE.dtype,
    )


if __name__ == "__main__":
    inputs = random_inputs()
    PASSES[sys.argv[2]](candidate(sys.argv[1]), inputs, torch.randn_like(inputs.query))
    print(own_peak_memory())
