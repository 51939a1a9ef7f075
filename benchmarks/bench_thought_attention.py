"""``thought_attention`` in each fused backend against library attention over the whole thought tree.

The peers are what a tree pass costs without an op for it: base and thought keys in one sequence of L + P*T, queries of
all P*S thought tokens, and a mask of [P*S, L + P*T]: as a tensor for scaled-dot-product attention, as a block mask for
FlexAttention. Thought tokens are numbered anchor by anchor or step by step; FlexAttention takes both, since what blocks
of scores it can leave out depends on it. Masks are built and kernels compiled beforehand, the concatenation of the keys
is timed. The last peer folds steps into heads, calls the library's attention on base keys and merges the thoughts in;
where PyTorch finds FlashAttention-3 (its package ``flash_attn_interface``), the library's is that. FLOPs and bytes
counted are of the visible (query, key) pairs and of tensors read or written once. What is promised on a GPU stands in
``promises``.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from comparison import OURS
from measure import DEVICE, own_peak_memory, peak_memory
from peers import assert_same_task, present
from shapes import THOUGHT_ATTENTION, ThoughtAttentionShape
from tolerances import assert_as_accurate
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from quietstar.ops import thought_attention
from quietstar.ops._backend import BACKENDS
from quietstar.ops.thought_attention.cost import thought_attention_cost

pytestmark = pytest.mark.usefixtures("memory_kept")

SHAPE = THOUGHT_ATTENTION[DEVICE]
DENSE = "dense-mask SDPA"
FLEX = "FlexAttention, anchor by anchor"
FLEX_BY_STEP = "FlexAttention, step by step"
LIBRARY = "library attention + merge"  # what our torch backend does
FLASH_3 = "FlashAttention-3 + merge"  # the same with kernels for Hopper
PEERS = (DENSE, FLEX, FLEX_BY_STEP)
CHECKED_ANCHORS = 64


class Inputs(NamedTuple):
    """Arguments of ``thought_attention``; the anchors are the last P positions, or each position P // L times."""

    query: Tensor
    key: Tensor
    value: Tensor
    thought_key: Tensor
    thought_value: Tensor


Attention = Callable[[Inputs], Tensor]


def forward(attention: Attention, inputs: Inputs, gradient: Tensor) -> tuple[Tensor, ...]:
    return (attention(inputs),)


def forward_and_backward(attention: Attention, inputs: Inputs, gradient: Tensor) -> tuple[Tensor, ...]:
    output = attention(inputs)
    return output, *torch.autograd.grad(output, inputs, gradient)


class Task(NamedTuple):
    run: Callable[[Attention, Inputs, Tensor], tuple[Tensor, ...]]
    shape: ThoughtAttentionShape
    queries: int
    """S, the last steps of the T = shape.steps."""
    anchors: int
    rounds: int
    backward_only: bool = False
    """Whether the forward is left out of the time."""


TASKS = {
    "forward": Task(forward, SHAPE, SHAPE.steps, SHAPE.length, rounds=9),
    "forward+backward": Task(forward_and_backward, SHAPE, SHAPE.steps, SHAPE.length, rounds=5),
    "sampling step": Task(forward, SHAPE, 1, SHAPE.length, rounds=41),
    # Thoughts behind the last token of each text, as generation has them.
    "decoding": Task(forward, replace(SHAPE, batch=8), 1, 1, rounds=241),
}
if DEVICE == "cuda":
    for length in (SHAPE.length, 2 * SHAPE.length):
        shape = replace(SHAPE, length=length)
        TASKS[f"forward, L = {length}"] = Task(forward, shape, shape.steps, length, rounds=9)
        TASKS[f"backward, L = {length}"] = Task(forward_and_backward, shape, shape.steps, length, 5, backward_only=True)
    del TASKS["forward"]


def random_inputs(task: Task) -> Inputs:
    shape, anchors = task.shape, task.anchors
    base = (shape.batch, shape.kv_heads, shape.length, shape.head_dim)
    thoughts = (shape.batch, shape.kv_heads, anchors, shape.steps, shape.head_dim)
    query = (shape.batch, shape.heads, anchors, task.queries, shape.head_dim)
    make = partial(torch.randn, device=DEVICE, dtype=shape.dtype, requires_grad=task.run is forward_and_backward)
    return Inputs(*(make(size) for size in (query, base, base, thoughts, thoughts)))


def sizes(inputs: Inputs) -> tuple[int, int, int, int]:
    """L, P, S and T."""
    return inputs.key.shape[2], *inputs.query.shape[2:4], inputs.thought_key.shape[3]


def tree(
    length: int, anchors: int, queries: int, steps: int, by_step: bool
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Which thought token sees which key, both by their place in one sequence: a ``mask_mod`` of FlexAttention."""

    def split(place: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        return (place % anchors, place // anchors) if by_step else (place // steps, place % steps)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        anchor, step = split(query, queries)
        key_anchor, key_step = split(key - length, steps)
        base = key <= position_of(anchor, length, anchors)
        own = (key_anchor == anchor) & (key_step <= steps - queries + step)
        return torch.where(key < length, base, own)

    return visible


def additive_mask(inputs: Inputs) -> Tensor:
    """Additive [P*S, L + P*T]; additive because a boolean one is slower on the CPU."""
    length, anchors, queries, steps = sizes(inputs)
    query, key = (torch.arange(size, device=DEVICE) for size in (anchors * queries, length + anchors * steps))
    visible = tree(*sizes(inputs), by_step=False)(None, None, query[:, None], key)
    return torch.zeros(visible.shape, device=DEVICE, dtype=inputs.query.dtype).masked_fill_(~visible, -torch.inf)


def in_one_sequence(attend: Callable[..., Tensor], inputs: Inputs, by_step: bool) -> Tensor:
    def flat(tensor: Tensor) -> Tensor:
        return (tensor.transpose(2, 3) if by_step else tensor).flatten(2, 3)

    query, key, value, thought_key, thought_value = inputs
    output = attend(flat(query), torch.cat([key, flat(thought_key)], 2), torch.cat([value, flat(thought_value)], 2))
    anchors, queries = query.shape[2:4]
    return output.unflatten(2, (queries, anchors)).transpose(2, 3) if by_step else output.view_as(query)


@cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """Compiled anew for each shape; by default, after one comes a kernel for any shape, and after eight none at all."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@cache
def block_mask(length: int, anchors: int, queries: int, steps: int, by_step: bool) -> BlockMask:
    """One for all inputs of these sizes, since a kernel is compiled for a mask."""
    visible, keys = tree(length, anchors, queries, steps, by_step), length + anchors * steps
    return create_block_mask(visible, None, None, anchors * queries, keys, DEVICE, _compile=DEVICE == "cuda")


def dense_attention(mask: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if DEVICE == "cuda":  # where the library has no fused kernel that takes both a mask and grouped heads
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def anchors_of(inputs: Inputs) -> Tensor | None:
    length, count = sizes(inputs)[:2]
    return None if count == length else position_of(torch.arange(count, device=DEVICE), length, count)


def position_of(anchor: Tensor, length: int, count: int) -> Tensor:
    return anchor // (count // length) if count > length else length - count + anchor


def op(backend: str, anchors: Tensor | None, inputs: Inputs) -> Tensor:
    return thought_attention(*inputs, anchors=anchors, backend=backend)


def candidate(name: str, inputs: Inputs) -> Attention:
    """The one of that name for inputs of these shapes."""
    if name == DENSE:
        return partial(in_one_sequence, partial(dense_attention, additive_mask(inputs)), by_step=False)
    if name in (FLEX, FLEX_BY_STEP):
        by_step = name == FLEX_BY_STEP
        mask = block_mask(*sizes(inputs), by_step)
        return partial(
            in_one_sequence, partial(compiled_flex_attention(), block_mask=mask, enable_gqa=True), by_step=by_step
        )
    return partial(op, "torch" if name in (LIBRARY, FLASH_3) else name, anchors_of(inputs))


@cache
def flash_3_missing() -> str | None:
    """Makes FlashAttention-3 what the library calls from now on; why not, if it can't be."""
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    except Exception as error:  # of any kind: it is somebody else's package
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def laid_out(name: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of the same shapes and values; for who works step by step also in that order in memory, so that nobody copies."""
    if name != FLEX_BY_STEP:
        return tensors
    copies = (x.detach().transpose(2, 3).contiguous().transpose(2, 3) if x.dim() == 5 else x.detach() for x in tensors)
    return tuple(copy.requires_grad_(x.requires_grad) for copy, x in zip(copies, tensors, strict=True))


def assert_right(task: Task, inputs: Inputs) -> Callable[[str], None]:
    """A function that checks a candidate: ours is about as near to float64 as eager PyTorch, in output and gradients.

    The specification can't afford all anchors in float64: some are picked, and only their outputs get a gradient.
    """
    picked = torch.randperm(task.anchors, device=DEVICE)[:CHECKED_ANCHORS].sort().values
    gradient = torch.zeros_like(inputs.query)
    gradient[:, :, picked] = torch.randn_like(gradient[:, :, picked])

    def of_picked(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor[:, :, picked] if tensor.dim() == 5 else tensor for tensor in tensors]

    specification = partial(op, "reference", position_of(picked, *sizes(inputs)[:2]))
    some = Inputs(*(tensor.detach() for tensor in of_picked(inputs)))
    exact = Inputs(*(tensor.double() for tensor in some))
    for tensor in (*some, *exact):
        tensor.requires_grad_(inputs.query.requires_grad)
    [some_gradient] = of_picked([gradient])
    oracle = task.run(specification, exact, some_gradient.double())
    eager = task.run(specification, some, some_gradient)

    def check(name: str) -> None:
        """``name`` of a candidate."""
        theirs = Inputs(*laid_out(name, inputs))
        answer = task.run(candidate(name, theirs), theirs, *laid_out(name, (gradient,)))
        names = ("output", *Inputs._fields)[: len(answer)]
        for quantity, mine, other, truth in zip(names, of_picked(answer), eager, oracle, strict=True):
            if name in (DENSE, FLEX, FLEX_BY_STEP):
                assert_same_task(quantity, mine, truth)
            else:
                assert_as_accurate(mine, other, truth, name=quantity)

    return check


def prepared(task: Task, name: str, inputs: Inputs, gradient: Tensor) -> Callable[[], object]:
    """One call of a candidate, ready to be timed."""
    inputs, attention = Inputs(*laid_out(name, inputs)), candidate(name, inputs)
    [gradient] = laid_out(name, (gradient,))
    if task.backward_only:
        return partial(torch.autograd.grad, attention(inputs), inputs, gradient, retain_graph=True)
    return partial(task.run, attention, inputs, gradient)


def memory(name: str, backend: str, runs: Mapping[str, Callable[[], object]]) -> dict[str, int]:
    """Peak bytes of those candidates that can be told: on a CPU a process that compiles shows the compiler's memory."""
    if DEVICE == "cuda":
        return {label: peak_memory(__file__, run=run) for label, run in runs.items()}
    if TASKS[name].queries == 1:  # nothing beside Python and torch
        return {}
    tellable = [label for label in runs if label not in (FLEX, FLEX_BY_STEP)]
    return {label: peak_memory(__file__, backend if label == OURS else label, name) for label in tellable}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("reference", "torch")])  # peers, both
def bench_thought_attention(backend, name, compare):
    task = TASKS[name]
    inputs = random_inputs(task)
    single = Inputs(*(tensor[:1, :, -1:] for tensor in inputs))
    try:
        candidate(backend, single)(single)
    except ValueError as unavailable:
        pytest.skip(str(unavailable))
    check = assert_right(task, inputs)
    check(backend)
    library, absent = LIBRARY, {}
    if DEVICE == "cuda":
        reason = flash_3_missing()
        library, absent = (LIBRARY, {FLASH_3: reason}) if reason else (FLASH_3, {})
    peers, missing = present((*PEERS, library), check)
    gradient = torch.randn_like(inputs.query)
    runs = {OURS: prepared(task, backend, inputs, gradient)}
    runs |= {peer: prepared(task, peer, inputs, gradient) for peer in peers}
    cost = thought_attention_cost(*inputs, anchors=anchors_of(inputs))
    passes = cost if task.run is forward_and_backward else cost[:1]
    if task.backward_only:
        passes = cost[1:]
    peak = memory(name, backend, runs)
    compare(
        runs.pop(OURS),
        runs,
        rounds=task.rounds,
        promised=SHAPE.target if name == "forward" else None,
        memory=peak,
        flops=sum(each.flops for each in passes),
        dtype=task.shape.dtype,
        moved=sum(each.bytes for each in passes),
        missing=missing | absent,
        shape=task.shape,
    )


if __name__ == "__main__":
    who, task = sys.argv[1], TASKS[sys.argv[2]]
    inputs = random_inputs(task)
    prepared(task, who, inputs, torch.randn_like(inputs.query))()
    print(own_peak_memory())
