"""How many FLOPs a training step takes and how many bytes it moves, part by part.

A product of [m, n] and [n, p] takes 2·m·n·p FLOPs. A linear layer takes as many for each of its two gradients as for
its result. Attention counts visible pairs of query and key only. Other operations are counted by the bytes they move.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from quietstar.estimate.dry_run import LAYER, LAYER_BACK, Attention, Course
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
    tree = step.tree_courses(checkpointing=False)
    attention, attention_backward = _tree_attention(step)
    parts = _sampling(step, "teacher" if step.distil else "sampling")
    if step.has_teacher:
        parts += _teacher(step)
    parts += [
        Part("tree, forward: matrices", *_products(tree, LAYER)),
        Part("tree, forward: attention", *attention),
        Part("tree, forward: elementwise", 0, _moved(tree, LAYER)),
        *_heads(step),
        Part("tree, backward: matrices", *_products(tree, LAYER_BACK)),
        Part("tree, backward: attention", *attention_backward),
        Part("tree, backward: elementwise", 0, _moved(tree, LAYER_BACK)),
    ]
    if step.checkpointing:
        again = step.tree_courses(checkpointing=True)
        flops, moved = (
            twice - once for twice, once in zip(_products(again, LAYER_BACK), _products(tree, LAYER_BACK), strict=True)
        )
        parts += [
            Part("tree, once more: matrices", flops, moved, again=True),
            Part("tree, once more: attention", *attention, again=True),
            Part("tree, once more: elementwise", 0, _moved(again, LAYER_BACK) - _moved(tree, LAYER_BACK), again=True),
        ]
    if step.optimizer != "none":
        # Weights are read and written, gradients read, states read and written.
        parts.append(Part("update", 0, 3 * step.skeleton.whole.trained_bytes + 2 * step.states))
    return parts


def model_flops(step: TrainingStep) -> int:
    """FLOPs that the objective needs once: nothing of what checkpointing repeats, no logits that have no gradient."""
    waste = 0 if step.device == "cpu" else _head_flops(step) - _head_flops(step, needed=True)
    return sum(part.flops for part in step_parts(step) if not part.again) - waste


def _sampling(step: TrainingStep, name: str) -> list[Part]:
    k, rows = step.config.thought_length, step.sampled_rows
    steps = k + 2 if step.distil else k  # whose thoughts are read to their end
    text, thoughts = step.plain_courses(step.batch, step.length), step.plain_courses(rows, 1)
    head = _linear(step, rows, step.config.hidden_size, step.config.vocab_size, result=step.wide)
    drawn = rows * step.config.vocab_size * step.wide  # logits are read once more, to draw from
    attention = [_text_attention(step).forward]
    attention += [_thought_attention(step, step.sampling_positions, 1, taken).forward for taken in range(1, steps + 1)]
    return [
        Part(f"{name}: text, matrices", *_products(text, LAYER)),
        Part(f"{name}: thoughts, matrices", *(steps * x for x in _products(thoughts, LAYER))),
        Part(f"{name}: attention", *_together(attention)),
        Part(f"{name}: head", k * head.flops, k * (head.bytes + drawn)),
        Part(f"{name}: elementwise", 0, _moved(text, LAYER) + steps * _moved(thoughts, LAYER)),
    ]


def _teacher(step: TrainingStep) -> list[Part]:
    """What a teacher computes: the text, thoughts that it is to be compared on, or all it has to say to be learned."""
    if step.distil:  # what it says after the thoughts that it has sampled
        parts = [Part("teacher: nll", *_measured(step, 2 * step.text_rows))]
        mixes = step.config.prediction == "mixed"
        return [*parts, Part("teacher: mixing head", *_mixing(step, step.text_rows))] if mixes else parts
    courses, attention, rows = [], [], 0
    if step.config.baseline == "teacher":
        courses += step.plain_courses(step.batch, step.length)
        attention.append(_text_attention(step).forward)
        rows += step.base_rows
    if step.compares_thoughts:
        courses += step.plain_courses(step.tree_rows, 1)
        attention.append(_tree_attention(step).forward)
        rows += step.base_rows + step.talk_rows + step.policy_rows
    parts = [
        Part("teacher: matrices", *_products(courses, LAYER)),
        Part("teacher: attention", *_together(attention)),
        Part("teacher: nll", *_measured(step, rows)),
        Part("teacher: elementwise", 0, _moved(courses, LAYER)),
    ]
    mixes = step.compares_thoughts and step.mixes
    return [*parts, Part("teacher: mixing head", *_mixing(step, step.talk_rows))] if mixes else parts


def _measured(step: TrainingStep, rows: int) -> Cost:
    """Nll of rows without a gradient."""
    logits = _linear(step, rows, step.config.hidden_size, step.config.vocab_size, result=step.wide)
    return Cost(logits.flops, logits.bytes + rows * step.config.vocab_size * step.wide)


def _heads(step: TrainingStep) -> list[Part]:
    """Mixing head and the three losses, forward and backward."""
    hidden, vocabulary, parts = step.config.hidden_size, step.config.vocab_size, []
    if step.mixes:
        parts.append(Part("mixing head", *(3 * x for x in _mixing(step, step.talk_rows))))
    for name, (rows, products) in _head_rows(step).items():
        logits = _linear(step, rows, hidden, vocabulary, result=step.wide)
        # Behind the first product, logits are read; where others follow, their gradient is written in their place.
        other = (1 + (products > 1)) * rows * vocabulary * step.wide
        parts.append(Part(name, products * logits.flops, products * logits.bytes + other))
    return parts


def _mixing(step: TrainingStep, rows: int) -> Cost:
    """The mixing head's forward, on rows after thoughts."""
    hidden = step.config.hidden_size
    matrices = (step.text_rows, hidden), (rows, hidden), (rows, hidden), (rows, 1)
    return _together(_linear(step, count, hidden, outputs) for count, outputs in matrices)


def _head_rows(step: TrainingStep, needed: bool = False) -> dict[str, tuple[int, int]]:
    """Rows of logits of every loss, and products with them: 3, without a gradient of the head 2, only to measure 1.

    A CPU computes the rows that are needed, a GPU all: finding them would be a wait.
    """
    if needed or step.device == "cpu":
        talk, policy = step.labelled_talk_rows, step.helpful_policy_rows
    else:
        talk, policy = step.talk_rows, step.policy_rows
    learned = 2 + step.skeleton.trains_head
    base = {"head: base loss": (step.base_rows, learned if step.learns_base else 1)}
    if step.distil:
        return base
    return base | {
        "head: mixed loss" if step.mixes else "head: talk loss": (talk, learned if step.learns_talk else 1),
        "head: policy loss": (policy, learned),
    }


def _head_flops(step: TrainingStep, needed: bool = False) -> int:
    return 2 * step.head_matrix * sum(rows * products for rows, products in _head_rows(step, needed).values())


def _linear(step: TrainingStep, rows: int, inputs: int, outputs: int, result: int | None = None) -> Cost:
    """One product with a weight; ``result`` are the bytes of a number in it, by default those of a weight."""
    moved = (rows * inputs + inputs * outputs) * step.element + rows * outputs * (result or step.element)
    return Cost(2 * rows * inputs * outputs, moved)


def _in_all_layers(step: TrainingStep, of_layer: Callable[[Attention], CallCost]) -> CallCost:
    """Attention of all layers, of which many are alike."""
    costs = [_scaled(of_layer(attention), count) for attention, count in Counter(step.dry_run.attention).items()]
    return CallCost(*map(_together, zip(*costs, strict=True)))


def _text_attention(step: TrainingStep) -> CallCost:
    """Causal attention over the text in all layers; FLOPs as in ``thought_attention_cost``."""

    def of_layer(layer: Attention) -> CallCost:
        window = min(layer.window or step.length, step.length)
        pairs = window * (window + 1) // 2 + (step.length - window) * window
        scores = step.batch * pairs * layer.query_heads * layer.head_size
        heads = layer.query_heads + layer.key_heads
        moved = step.text_rows * 2 * heads * layer.head_size * step.element
        return CallCost(Cost(4 * scores, moved), Cost(10 * scores, 2 * moved))

    return _in_all_layers(step, of_layer)


def _thought_attention(step: TrainingStep, positions: int, queries: int, keys: int) -> CallCost:
    """Thought attention in all layers behind ``positions``: S = ``queries`` of T = ``keys`` steps."""
    config = step.config
    if positions == step.length or config.anchors_per_text is None:
        at = torch.arange(positions)
    else:  # about where random ones are on average
        middle = (torch.arange(step.predicting) + 0.5) * ((step.length - config.lookahead) / step.predicting)
        at = torch.nn.functional.pad(middle.long(), (0, positions - step.predicting), value=-1)

    def of_layer(layer: Attention) -> CallCost:
        def states(heads: int, *sizes: int) -> torch.Tensor:
            return torch.empty(1, heads, *sizes, layer.head_size, dtype=step.dtype, device="meta")

        def passes(num_thoughts: int) -> CallCost:
            anchors = at.repeat_interleave(num_thoughts)
            text = states(layer.key_heads, step.length)
            thoughts = states(layer.key_heads, len(anchors), keys)
            return thought_attention_cost(
                states(layer.query_heads, len(anchors), queries), text, text, thoughts, thoughts,
                anchors=anchors, window=layer.window, window_from="step",
            )  # fmt: skip

        # Every further thought costs the same: what it sees of the text is read already.
        one, two = passes(1), passes(2)
        more = step.thoughts - 1
        return CallCost(
            *(
                Cost(*(step.batch * (x + more * (y - x)) for x, y in zip(first, second, strict=True)))
                for first, second in zip(one, two, strict=True)
            )
        )

    return _in_all_layers(step, of_layer)


def _tree_attention(step: TrainingStep) -> CallCost:
    """Attention of the tree in all layers: the text and all slots."""
    text = _text_attention(step)
    if step.distil:
        return text
    thoughts = _thought_attention(step, step.positions, step.slots, step.slots)
    return CallCost(*map(_together, zip(text, thoughts, strict=True)))


def _products(courses: list[Course], stretch: str) -> Cost:
    return _together(course.products(stretch) for course in courses)


def _moved(courses: list[Course], stretch: str) -> int:
    return sum(course.moved(stretch) for course in courses)


def _together(costs: Iterable[Cost]) -> Cost:
    return Cost(*map(sum, zip(*costs, strict=True)))


def _scaled(cost: CallCost, factor: int) -> CallCost:
    return CallCost(*(Cost(part.flops * factor, part.bytes * factor) for part in cost))
