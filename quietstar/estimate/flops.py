"""How many FLOPs a training step takes and how many bytes it moves, part by part.

A product of [m, n] and [n, p] takes 2·m·n·p FLOPs. A linear layer takes as many for each of its two gradients as for
its result. Attention counts visible pairs of query and key only. Other operations are counted by the bytes they move.
"""

from typing import NamedTuple

import torch

from quietstar.estimate.step import TrainingStep
from quietstar.ops.thought_attention.cost import CallCost, Cost, thought_attention_cost


class Part(NamedTuple):
    """A part of the step."""

    name: str
    flops: int
    """In matrix products, attention included."""
    bytes: int
    """Read or written at the least: every operand of an operation once, every result once."""
    again: bool = False
    """Whether the part only computes once more what was computed before: no FLOPs of the model."""


def step_parts(step: TrainingStep) -> list[Part]:
    """All parts of the step, in the order in which they run."""
    layers = step.config.num_hidden_layers
    tree = _layers(step, step.tree_rows)
    tree_attention, tree_attention_backward = _tree_attention(step)
    parts = [*_sampling(step)]
    parts += [
        Part("tree, forward: matrices", *tree),
        Part("tree, forward: attention", *tree_attention),
        Part("tree, forward: elementwise", 0, _elementwise(step, step.tree_rows)),
        *_heads(step),
        Part("tree, backward: matrices", 2 * tree.flops, 2 * tree.bytes),
        Part("tree, backward: attention", *tree_attention_backward),
        Part("tree, backward: elementwise", 0, 2 * _elementwise(step, step.tree_rows)),
    ]
    if step.checkpointing:
        # The last matrix of a layer is spared: nothing is kept of its result.
        down = _linear(step, step.tree_rows, step.config.intermediate_size, step.config.hidden_size)
        again = Cost(tree.flops - layers * down.flops, tree.bytes - layers * down.bytes)
        parts += [
            Part("tree, once more: matrices", *again, again=True),
            Part("tree, once more: attention", *tree_attention, again=True),
            Part("tree, once more: elementwise", 0, _elementwise(step, step.tree_rows), again=True),
        ]
    if step.optimizer != "none":
        # Weights are read and written, gradients read, states read and written.
        parts.append(Part("update", 0, 3 * step.parameters * step.element + 2 * step.states))
    return parts


def model_flops(step: TrainingStep) -> int:
    """FLOPs that the objective needs once: nothing of what checkpointing repeats, no logits that have no gradient."""
    waste = 0 if step.device == "cpu" else _head_flops(step) - _head_flops(step, needed=True)
    return sum(part.flops for part in step_parts(step) if not part.again) - waste


def _sampling(step: TrainingStep) -> list[Part]:
    k, rows, layers = step.config.thought_length, step.sampled_rows, step.config.num_hidden_layers
    text, thoughts = _layers(step, step.text_rows), _layers(step, rows)
    head = _linear(step, rows, step.config.hidden_size, step.config.vocab_size, result=step.wide)
    drawn = rows * step.config.vocab_size * step.wide  # logits are read once more, to draw from
    attention = [_thought_attention(step, step.sampling_positions, 1, taken).forward for taken in range(1, k + 1)]
    text_attention = _scaled(_text_attention(step).forward, layers)
    elementwise = _elementwise(step, step.text_rows) + k * _elementwise(step, rows)
    return [
        Part("sampling: text, matrices", *text),
        Part("sampling: thoughts, matrices", k * thoughts.flops, k * thoughts.bytes),
        Part(
            "sampling: attention",
            text_attention.flops + layers * sum(cost.flops for cost in attention),
            text_attention.bytes + layers * sum(cost.bytes for cost in attention),
        ),
        Part("sampling: head", k * head.flops, k * (head.bytes + drawn)),
        Part("sampling: elementwise", 0, elementwise),
    ]


def _heads(step: TrainingStep) -> list[Part]:
    """Mixing head and the three losses, forward and backward."""
    hidden, vocabulary = step.config.hidden_size, step.config.vocab_size
    mixing = [
        _linear(step, step.text_rows, hidden, hidden),
        _linear(step, step.talk_rows, hidden, hidden),
        _linear(step, step.talk_rows, hidden, hidden),
        _linear(step, step.talk_rows, hidden, 1),
    ]
    parts = []
    if step.mixes:
        parts.append(Part("mixing head", 3 * sum(c.flops for c in mixing), 3 * sum(c.bytes for c in mixing)))
    for name, (rows, products) in _head_rows(step).items():
        logits = _linear(step, rows, hidden, vocabulary, result=step.wide)
        # Behind the first product, logits are read; where others follow, their gradient is written in their place.
        other = (1 + (products > 1)) * rows * vocabulary * step.wide
        parts.append(Part(name, products * logits.flops, products * logits.bytes + other))
    return parts


def _head_rows(step: TrainingStep, needed: bool = False) -> dict[str, tuple[int, int]]:
    """Rows of logits of every loss, and products with them: three, or one where it only measures.

    A CPU computes the rows that are needed, a GPU all: finding them would be a wait.
    """
    if needed or step.device == "cpu":
        talk, policy = step.labelled_talk_rows, step.helpful_policy_rows
    else:
        talk, policy = step.talk_rows, step.policy_rows
    return {
        "head: base loss": (step.base_rows, 3 if step.learns_base else 1),
        "head: mixed loss" if step.mixes else "head: talk loss": (talk, 3 if step.learns_talk else 1),
        "head: policy loss": (policy, 3),
    }


def _head_flops(step: TrainingStep, needed: bool = False) -> int:
    return 2 * step.head_matrix * sum(rows * products for rows, products in _head_rows(step, needed).values())


def _linear(step: TrainingStep, rows: int, inputs: int, outputs: int, result: int | None = None) -> Cost:
    """One product with a weight; ``result`` are the bytes of a number in it, by default those of a weight."""
    moved = (rows * inputs + inputs * outputs) * step.element + rows * outputs * (result or step.element)
    return Cost(2 * rows * inputs * outputs, moved)


def _layers(step: TrainingStep, rows: int) -> Cost:
    """The seven matrices of all layers on some rows."""
    config = step.config
    hidden, inner = config.hidden_size, config.intermediate_size
    matrices = [(hidden, step.query_width), *2 * [(hidden, step.key_width)], (step.query_width, hidden)]
    matrices += [*2 * [(hidden, inner)], (inner, hidden)]
    costs = [_linear(step, rows, *matrix) for matrix in matrices]
    return _scaled(Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs)), config.num_hidden_layers)


def _elementwise(step: TrainingStep, rows: int) -> int:
    """Bytes that the operations between the products of all layers move, each run on its own as transformers does.

    The backward is counted as twice that.
    """
    config, element, wide = step.config, step.element, step.wide
    # RMSNorm: square, mean, scale in float32, weight in the dtype; in half precision a conversion there and one back.
    norm = config.hidden_size * (5 * wide + 2 * element + (2 * (wide + element) if element < wide else 0))
    # Rotation: two products, the halves swapped (one is negated), a sum. Attention: text and slots joined.
    heads = 10 * (step.query_width + step.key_width) + 2 * step.query_width
    # Two residual sums; activation and product of the MLP.
    other = 2 * 3 * config.hidden_size + 5 * config.intermediate_size
    return config.num_hidden_layers * rows * (2 * norm + (heads + other) * element)


class _AttentionCost(NamedTuple):
    forward: Cost
    backward: Cost


def _text_attention(step: TrainingStep) -> _AttentionCost:
    """Causal attention over the text in one layer; FLOPs as in ``thought_attention_cost``."""
    window = min(step.config.sliding_window or step.length, step.length)
    pairs = window * (window + 1) // 2 + (step.length - window) * window
    scores = step.batch * pairs * step.query_width
    moved = step.text_rows * 2 * (step.query_width + step.key_width) * step.element
    return _AttentionCost(Cost(4 * scores, moved), Cost(10 * scores, 2 * moved))


def _thought_attention(step: TrainingStep, positions: int, queries: int, keys: int) -> _AttentionCost:
    """Thought attention in one layer behind ``positions``: S = ``queries`` of T = ``keys`` steps."""
    config = step.config
    if config.anchors_per_text is None:
        at = torch.arange(positions)
    else:  # about where random ones are on average
        middle = (torch.arange(step.predicting) + 0.5) * ((step.length - config.lookahead) / step.predicting)
        at = torch.nn.functional.pad(middle.long(), (0, positions - step.predicting), value=-1)

    def states(heads: int, *sizes: int) -> torch.Tensor:
        return torch.empty(1, heads, *sizes, step.head_size, dtype=step.dtype, device="meta")

    def passes(num_thoughts: int) -> CallCost:
        anchors = at.repeat_interleave(num_thoughts)
        query = states(config.num_attention_heads, len(anchors), queries)
        text = states(config.num_key_value_heads, step.length)
        thoughts = states(config.num_key_value_heads, len(anchors), keys)
        return thought_attention_cost(
            query, text, text, thoughts, thoughts, anchors=anchors, window=config.sliding_window, window_from="step"
        )

    # Every further thought costs the same: what it sees of the text is read already.
    one, two = passes(1), passes(2)
    more = config.num_thoughts - 1
    return _AttentionCost(
        *(
            _scaled(Cost(*(x + more * (y - x) for x, y in zip(first, second, strict=True))), step.batch)
            for first, second in zip(one, two, strict=True)
        )
    )


def _tree_attention(step: TrainingStep) -> tuple[Cost, Cost]:
    """Attention of the tree in all layers, forward and backward: the text and all slots."""
    passes = zip(_text_attention(step), _thought_attention(step, step.positions, step.slots, step.slots), strict=True)
    return tuple(
        _scaled(Cost(text.flops + slots.flops, text.bytes + slots.bytes), step.config.num_hidden_layers)
        for text, slots in passes
    )


def _scaled(cost: Cost, factor: int) -> Cost:
    return Cost(cost.flops * factor, cost.bytes * factor)
