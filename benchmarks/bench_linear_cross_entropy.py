"""The linear cross-entropies, forward and backward, against plain PyTorch and every fused implementation installed.

FLOPs counted: three matmuls, 2 rows H V each, which make the logits, d hidden and d weight. The bytes that have to
move, hidden states, weight and gradients, are nothing beside them (at 2048 x 4096 x 32000 in half precision 0.8 GB, on
an H200 0.2 ms of 2); logits kept as a whole would be.

Promised: on two CPU cores ``linear_cross_entropy`` takes at most 1.1 times as long as plain PyTorch; on an H200, in
half precision, ``mixed_linear_cross_entropy`` 2.3 ms with 2048 rows, and 700 TFLOP/s with 16384.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from comparison import OURS
from measure import DEVICE, own_peak_memory, peak_memory
from peers import (
    FUSED,
    LINEAR_CROSS_ENTROPY,
    OUR_TORCH,
    UNTOLD_MEMORY,
    assert_same_task,
    plain_cross_entropy,
    present,
)
from shapes import LINEAR_CROSS_ENTROPY as LINEAR_SHAPES
from shapes import MIXED_LINEAR_CROSS_ENTROPY as MIXED_SHAPES
from shapes import HeadShape, by_rows
from tolerances import assert_as_accurate
from torch import Tensor

from quietstar.ops import linear_cross_entropy, mixed_linear_cross_entropy
from quietstar.ops._backend import BACKENDS

pytestmark = pytest.mark.usefixtures("memory_kept")

SHAPES = {"linear": LINEAR_SHAPES[DEVICE], "mixed_linear": MIXED_SHAPES[DEVICE]}
CASES = {f"{op}-{name}": (op, shape) for op, shapes in SHAPES.items() for name, shape in by_rows(shapes).items()}
CHECKED_ROWS = 128


class Inputs(NamedTuple):
    """What gets a gradient; two are None unless predictions are mixed."""

    hidden: Tensor
    thought: Tensor | None
    mixing_weight: Tensor | None
    weight: Tensor


Step = Callable[[Inputs, Tensor], Tensor]


def random_inputs(op: str, shape: HeadShape) -> tuple[Inputs, Tensor]:
    make = partial(torch.randn, device=DEVICE, dtype=shape.dtype)
    mixed = op == "mixed_linear"
    hidden, thought = make(2, shape.rows, shape.hidden_size)
    weight = make(shape.vocab_size, shape.hidden_size) * shape.hidden_size**-0.5
    inputs = Inputs(hidden, thought if mixed else None, make(shape.rows) if mixed else None, weight)
    target = torch.randint(shape.vocab_size, (shape.rows,), device=DEVICE)
    return Inputs(*(None if x is None else x.requires_grad_() for x in inputs)), target


def written_out(loss: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, target: Tensor) -> Tensor:
    """A loss that knows nothing of mixing, on hidden states mixed before."""
    hidden, thought, mixing_weight, weight = inputs
    if thought is not None:
        hidden = torch.lerp(hidden, thought, mixing_weight[:, None])
    return loss(hidden, weight, target)


def ours(backend: str, inputs: Inputs, target: Tensor) -> Tensor:
    hidden, thought, mixing_weight, weight = inputs
    if thought is None:
        return linear_cross_entropy(hidden, weight, target, backend=backend)
    return mixed_linear_cross_entropy(hidden, thought, mixing_weight, weight, target, backend=backend)


def candidate(name: str) -> Step:
    if name in BACKENDS or name == OUR_TORCH:
        return partial(ours, "torch" if name == OUR_TORCH else name)
    return partial(written_out, LINEAR_CROSS_ENTROPY[name]())


def forward_and_backward(step: Step, inputs: Inputs, target: Tensor) -> list[Tensor | None]:
    """The loss and the gradients of all inputs."""
    loss = step(inputs, target)
    present = [x for x in inputs if x is not None]
    gradients = iter(torch.autograd.grad(loss, present))
    return [loss, *(None if x is None else next(gradients) for x in inputs)]


class Check:
    """Answers of candidates against float64, which can't afford all rows: some are picked, the others have no label."""

    def __init__(self, inputs: Inputs, target: Tensor):
        picked = torch.randperm(len(target), device=DEVICE)[:CHECKED_ROWS].sort().values
        self.inputs, self.picked = inputs, picked
        self.target = torch.full_like(target, -100).index_copy(0, picked, target[picked])
        exact = Inputs(*(None if x is None else self._of_picked(x).detach().double().requires_grad_() for x in inputs))
        step = partial(written_out, lambda *x: torch.nn.functional.cross_entropy(x[0] @ x[1].t(), x[2]))
        self.oracle = forward_and_backward(step, exact, target[picked])
        self.eager = self._answer(partial(written_out, plain_cross_entropy))

    def _of_picked(self, tensor: Tensor) -> Tensor:
        return tensor[self.picked] if len(tensor) == len(self.inputs.hidden) else tensor

    def _answer(self, step: Step) -> dict[str, tuple[Tensor, Tensor]]:
        """Of the loss and every gradient: what the step gives, and what it should give."""
        loss, *gradients = forward_and_backward(step, self.inputs, self.target)
        answer = [loss, *(None if x is None else self._of_picked(x) for x in gradients)]
        pairs = zip(("loss", *Inputs._fields), answer, self.oracle, strict=True)
        return {name: (mine, truth) for name, mine, truth in pairs if mine is not None}

    def ours(self, step: Step) -> None:
        """About as near to the truth as plain PyTorch in the same dtype."""
        for name, (mine, truth) in self._answer(step).items():
            assert_as_accurate(mine, self.eager[name][0], truth, unit=self.inputs.hidden.dtype, name=name)

    def peer(self, name: str) -> Step:
        step = candidate(name)
        if name == OUR_TORCH:
            self.ours(step)
        for quantity, (theirs, truth) in self._answer(step).items():
            assert_same_task(quantity, theirs, truth)
        return step


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", FUSED)
def bench_cross_entropy(backend, case, compare):
    op, shape = CASES[case]
    inputs, target = random_inputs(op, shape)
    try:
        candidate(backend)(Inputs(*(None if x is None else x[:1] for x in inputs)), target[:1].clamp_max(0))
    except ValueError as unavailable:
        pytest.skip(str(unavailable))
    check = Check(inputs, target)
    check.ours(candidate(backend))
    peers, missing = present((*LINEAR_CROSS_ENTROPY, OUR_TORCH), check.peer)
    runs = {
        name: partial(forward_and_backward, step, inputs, target)
        for name, step in (peers | {OURS: candidate(backend)}).items()
    }
    memory = {
        name: peak_memory(__file__, backend if name == OURS else name, case, run=run)
        for name, run in runs.items()
        if name not in UNTOLD_MEMORY
    }
    compare(
        runs.pop(OURS),
        runs,
        rounds=3 if DEVICE == "cpu" and shape.rows > 1000 else 10,  # a CPU takes seconds for each
        promised=1 / 1.1 if (DEVICE, op) == ("cpu", "linear") else None,
        memory=memory,
        flops=6 * shape.rows * shape.hidden_size * shape.vocab_size,
        dtype=shape.dtype,
        missing=missing,
        shape=shape,
    )


if __name__ == "__main__":
    forward_and_backward(candidate(sys.argv[1]), *random_inputs(*CASES[sys.argv[2]]))
    print(own_peak_memory())
