"""How time and memory grow with the length L of the text, the S thought tokens and N thoughts of a position, and rows.

Each sweep fits a power of the size to ours, to what one would write without an op, and to the ideal: FLOPs of the
visible pairs (or of the logits) for the time, inputs and results read and written once for the memory. Memory is that
of tensors, of one call with all that it needs, so of a dense-mask attention with its mask, without the inputs.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import bench_linear_cross_entropy as head
import bench_thought_attention as attention
import pytest
import torch
from comparison import OURS, Case
from measure import DEVICE, tensor_memory
from peers import PLAIN, present
from shapes import SCALING

from quietstar.ops._rows import release_logits_buffer
from quietstar.ops.thought_attention.cost import thought_attention_cost

pytestmark = pytest.mark.usefixtures("memory_kept")

SHAPES = SCALING[DEVICE]
ROUNDS = 3
AUTO = "auto"  # ours as it comes


def attention_case(variable: str, size: int) -> Case:
    """Forward and backward."""
    shape, thoughts = SHAPES.attention, 1
    if variable == "thoughts":
        thoughts = size
    else:
        shape = replace(shape, **{variable: size})
    task = attention.Task(attention.forward_and_backward, shape, shape.steps, shape.length * thoughts, ROUNDS)
    inputs = attention.random_inputs(task)
    gradient = torch.randn_like(inputs.query)
    check = attention.assert_right(task, inputs)
    check(AUTO)
    peers, missing = present([attention.DENSE], check)

    def prepare(name: str) -> Callable[[], object]:
        return attention.prepared(task, AUTO if name == OURS else name, inputs, gradient)

    cost = thought_attention_cost(*inputs, anchors=attention.anchors_of(inputs))
    return Case(
        runs={name: prepare(name) for name in (OURS, *peers)},
        memory={name: tensor_memory(lambda name=name: prepare(name)()) for name in (OURS, *peers)},
        missing=missing,
        work=cost.forward.flops + cost.backward.flops,
        results=sum(tensor.nbytes for tensor in (gradient, *inputs)),  # as large as output and gradients
    )


def head_case(rows: int) -> Case:
    """Linear cross-entropy, forward and backward."""
    shape = replace(SHAPES.head, rows=rows)
    inputs, target = head.random_inputs("linear", shape)
    check = head.Check(inputs, target)
    ours = partial(head.ours, AUTO)
    check.ours(ours)
    peers, missing = present([PLAIN], check.peer)
    steps = {OURS: ours} | peers
    runs = {name: partial(head.forward_and_backward, step, inputs, target) for name, step in steps.items()}
    release_logits_buffer()  # or else what ours kept since its last call would not count
    return Case(
        runs=runs,
        memory={name: tensor_memory(run) for name, run in runs.items()},
        missing=missing,
        work=6 * rows * shape.hidden_size * shape.vocab_size,
        results=inputs.hidden.nbytes + inputs.weight.nbytes,  # as large as their gradients
    )


@pytest.mark.parametrize("variable", SHAPES.attention_sizes)
def bench_thought_attention_over(variable, sweep):
    sizes = SHAPES.attention_sizes[variable]
    sweep(variable, sizes, partial(attention_case, variable), rounds=ROUNDS, shape=SHAPES.attention)


def bench_linear_cross_entropy_over_rows(sweep):
    sweep("rows", SHAPES.rows, head_case, rounds=ROUNDS, shape=SHAPES.head)
