"""``mix_logits`` and ``mixed_cross_entropy``, forward and backward, against plain PyTorch and what it compiles to.

Bytes counted, e the size of a logit, for rows V logits of each prediction: mix_logits reads 2e and writes e, its
backward reads 3e and writes 2e; mixed_cross_entropy reads 2e, its backward reads 2e and writes 2e. That is 8e and 6e.
At some 15 instructions a logit all of it is bound by memory.

Promised on an H200: ``mixed_cross_entropy`` at 85 % of the speed of a copy.
"""

import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from comparison import OURS
from measure import DEVICE, own_peak_memory, peak_memory
from peers import COMPILED, FUSED, OUR_TORCH, PLAIN, UNTOLD_MEMORY, assert_same_task, compiled, present
from shapes import MIXING, LogitsShape
from tolerances import assert_as_accurate
from torch import Tensor
from torch.nn import functional as F

from quietstar.ops import mix_logits, mixed_cross_entropy
from quietstar.ops._backend import BACKENDS

pytestmark = pytest.mark.usefixtures("memory_kept")

BYTES_PER_LOGIT = {"mix_logits": 8, "mixed_cross_entropy": 6}  # times the size of one
SHAPES = {str(shape.rows): shape for shape in MIXING[DEVICE]}
CHECKED_ROWS = 128
NAMES = "result", "d_base", "d_thought", "d_mixing_weight"

Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def random_inputs(shape: LogitsShape) -> tuple[Tensor, ...]:
    """Logits without and with a thought, mixing weight, and target."""
    make = partial(torch.randn, device=DEVICE, dtype=shape.dtype, requires_grad=True)
    logits = (make(shape.rows, shape.vocab_size) for _ in range(2))
    return *logits, make(shape.rows), torch.randint(shape.vocab_size, (shape.rows,), device=DEVICE)


def plain_mix(base: Tensor, thought: Tensor, mixing_weight: Tensor, target: Tensor) -> Tensor:
    return torch.lerp(base, thought, mixing_weight[:, None])


def plain_cross_entropy(base: Tensor, thought: Tensor, mixing_weight: Tensor, target: Tensor) -> Tensor:
    mixed = plain_mix(base, thought, mixing_weight, target)
    return F.cross_entropy(mixed.to(torch.promote_types(mixed.dtype, torch.float32)), target)


def ours(op: str, backend: str, *inputs: Tensor) -> Tensor:
    if op == "mix_logits":
        return mix_logits(*inputs[:3], backend=backend)
    return mixed_cross_entropy(*inputs, backend=backend)


def candidate(op: str, name: str) -> Function:
    plain = plain_mix if op == "mix_logits" else plain_cross_entropy
    if name == COMPILED:
        return compiled(plain)
    return plain if name == PLAIN else partial(ours, op, "torch" if name == OUR_TORCH else name)


def forward_and_backward(function: Function, inputs: tuple[Tensor, ...], incoming: Tensor) -> tuple[Tensor, ...]:
    result = function(*inputs)
    return result, *torch.autograd.grad(result, inputs[:3], incoming)


def random_gradient(op: str, inputs: tuple[Tensor, ...]) -> Tensor:
    return torch.randn_like(inputs[0]) if op == "mix_logits" else torch.ones((), device=DEVICE)


def assert_right(op: str, inputs: tuple[Tensor, ...], incoming: Tensor) -> Callable[[str], Function]:
    """A function that checks a candidate and returns it: ours is about as near to float64 as plain PyTorch.

    In result and gradients of some rows: float64 can't afford all. The others have no label or, in ``mix_logits``, no
    incoming gradient.
    """
    rows = torch.randperm(len(inputs[0]), device=DEVICE)[:CHECKED_ROWS].sort().values
    target = inputs[3]
    inputs = *inputs[:3], torch.full_like(target, -100).index_copy(0, rows, target[rows])
    incoming_of_rows = incoming
    if op == "mix_logits":
        incoming_of_rows = incoming[rows]
        incoming = torch.zeros_like(incoming).index_copy(0, rows, incoming_of_rows)
    exact = *(x.detach()[rows].double().requires_grad_() for x in inputs[:3]), target[rows]
    oracle = forward_and_backward(candidate(op, PLAIN), exact, incoming_of_rows.double())

    def answer(function: Function) -> list[Tensor]:
        return [x if x.dim() == 0 else x[rows] for x in forward_and_backward(function, inputs, incoming)]

    eager = answer(candidate(op, PLAIN))

    def check(name: str) -> Function:
        function = candidate(op, name)
        for quantity, mine, other, truth in zip(NAMES, answer(function), eager, oracle, strict=True):
            if name in (*BACKENDS, OUR_TORCH):
                assert_as_accurate(mine, other, truth, unit=inputs[0].dtype, name=quantity)
            else:
                assert_same_task(quantity, mine, truth)
        return function

    return check


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("op", BYTES_PER_LOGIT)
@pytest.mark.parametrize("backend", FUSED)
def bench_mixing(backend, op, shape, compare):
    inputs = random_inputs(shape)
    try:
        ours(op, backend, *(x[:1] for x in inputs))
    except ValueError as unavailable:
        pytest.skip(str(unavailable))
    incoming = random_gradient(op, inputs)
    check = assert_right(op, inputs, incoming)
    functions = {OURS: check(backend)}
    peers, missing = present((PLAIN, COMPILED, OUR_TORCH), check)
    runs = {name: partial(forward_and_backward, f, inputs, incoming) for name, f in (functions | peers).items()}
    memory = {
        name: peak_memory(__file__, op, backend if name == OURS else name, str(shape.rows), run=run)
        for name, run in runs.items()
        if name not in UNTOLD_MEMORY
    }
    compare(
        runs.pop(OURS),
        runs,
        rounds=15,
        memory=memory,
        moved=BYTES_PER_LOGIT[op] * shape.dtype.itemsize * shape.rows * shape.vocab_size,
        missing=missing,
        shape=shape,
    )


if __name__ == "__main__":
    op, name, rows = sys.argv[1:]
    inputs = random_inputs(SHAPES[rows])
    forward_and_backward(candidate(op, name), inputs, random_gradient(op, inputs))
    print(own_peak_memory())
