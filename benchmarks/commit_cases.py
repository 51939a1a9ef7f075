"""The calls by which ``compare_commits`` compares ops: public functions only, which other commits have too."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from measure import DEVICE
from shapes import LINEAR_CROSS_ENTROPY, LINEAR_SAMPLE, MIXING, THOUGHT_ATTENTION, HeadShape, ThoughtAttentionShape
from torch import Tensor

from quietstar import ops

Call = Callable[[], object]


def cases(names: Iterable[str], backend: str | None) -> dict[str, Call]:
    """The calls of some ops, by name."""
    torch.manual_seed(0)
    return {f"{op}, {case}": call for op in names for case, call in _CASES[op](backend).items()}


def _thought_attention(backend: str | None) -> dict[str, Call]:
    shape: ThoughtAttentionShape = THOUGHT_ATTENTION[DEVICE]
    make = partial(torch.randn, device=DEVICE, dtype=shape.dtype, requires_grad=True)

    def inputs(queries: int, thoughts: int, anchors: int) -> list[Tensor]:
        base = [make(shape.batch, shape.kv_heads, shape.length, shape.head_dim) for _ in range(2)]
        own = [make(shape.batch, shape.kv_heads, anchors, thoughts, shape.head_dim) for _ in range(2)]
        return [make(shape.batch, shape.heads, anchors, queries, shape.head_dim), *base, *own]

    training = inputs(shape.steps, shape.steps, shape.length)
    sampling, decoding = (inputs(1, shape.steps, anchors) for anchors in (shape.length, 1))
    last = torch.tensor([shape.length - 1], device=DEVICE)
    return {
        "forward": _forward(ops.thought_attention, training, backend=backend),
        "forward and backward": _with_backward(ops.thought_attention, training, backend=backend),
        "sampling step": _forward(ops.thought_attention, sampling, backend=backend),
        "decoding": _forward(ops.thought_attention, decoding, backend=backend, anchors=last),
    }


def _head(shape: HeadShape) -> tuple[Tensor, Tensor]:
    make = partial(torch.randn, device=DEVICE, dtype=shape.dtype)
    weight = make(shape.vocab_size, shape.hidden_size) * shape.hidden_size**-0.5
    return make(shape.rows, shape.hidden_size).requires_grad_(), weight.requires_grad_()


def _linear_cross_entropy(backend: str | None) -> dict[str, Call]:
    made = {}
    for shape in LINEAR_CROSS_ENTROPY[DEVICE]:
        hidden, weight = _head(shape)
        target = torch.randint(shape.vocab_size, (shape.rows,), device=DEVICE)
        loss = partial(ops.linear_cross_entropy, target=target)
        made[f"{shape.rows} rows"] = _with_backward(loss, [hidden, weight], backend=backend)
    return made


def _linear_sample(backend: str | None) -> dict[str, Call]:
    made = {}
    for shape in LINEAR_SAMPLE[DEVICE]:
        hidden, weight = _head(shape)
        for name, options in {"": {}, ", top_k 50": {"top_k": 50}}.items():
            sample = partial(ops.linear_sample, seed=0, **options)
            made[f"{shape.rows} rows{name}"] = _forward(sample, [hidden, weight], backend=backend)
    return made


def _mixing(backend: str | None) -> dict[str, Call]:
    made = {}
    for shape in MIXING[DEVICE]:
        logits = [torch.randn(shape.rows, shape.vocab_size, device=DEVICE, dtype=shape.dtype) for _ in range(2)]
        weight = torch.rand(shape.rows, device=DEVICE, dtype=shape.dtype)
        inputs = [x.requires_grad_() for x in (*logits, weight)]
        loss = partial(ops.mixed_cross_entropy, target=torch.randint(shape.vocab_size, (shape.rows,), device=DEVICE))
        made[f"mix_logits, {shape.rows} rows"] = _forward(ops.mix_logits, inputs, backend=backend)
        made[f"mixed_cross_entropy, {shape.rows} rows"] = _with_backward(loss, inputs, backend=backend)
    return made


def _forward(op: Callable[..., Tensor], inputs: list[Tensor], **options: object) -> Call:
    with torch.no_grad():
        inputs = [x.detach() for x in inputs]
    return partial(op, *inputs, **options)


def _with_backward(op: Callable[..., Tensor], inputs: list[Tensor], **options: object) -> Call:
    return lambda: torch.autograd.grad(op(*inputs, **options).sum(), inputs)


_CASES: dict[str, Callable[[str | None], dict[str, Call]]] = {
    "thought_attention": _thought_attention,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_sample": _linear_sample,
    "mixing": _mixing,
}
