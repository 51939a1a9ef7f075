"""The sizes that are measured: small ones that two CPU cores carry, and ones that fill a GPU."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TrainingShape:
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    batch: int
    length: int
    num_thoughts: int
    thought_length: int
    lookahead: int
    dtype: torch.dtype
    target: float | None
    """How many times faster than its first peer the step has to be, where a promise was made."""


@dataclass(frozen=True)
class ThoughtAttentionShape:
    batch: int
    length: int
    steps: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    target: float | None
    """How many times faster than dense-mask attention the forward has to be, where a promise was made."""


@dataclass(frozen=True)
class DraftShape:
    """Attention as trainers of draft heads and of long thoughts need it: forward and backward of one layer."""

    batch: int
    length: int
    anchors: int
    queries: int
    """S, in every pass."""
    steps: tuple[int, ...]
    """T, of one pass after the other."""
    causal: bool
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    target: float | None
    """How many times faster than the best peer it has to be, where a promise was made."""


@dataclass(frozen=True)
class HeadShape:
    """Rows of hidden states and the head that turns them into logits."""

    rows: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class LogitsShape:
    rows: int
    vocab_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class ScalingShape:
    """What does not grow, and the sizes of what does: fields of the shapes, and thoughts of a position."""

    attention: ThoughtAttentionShape
    attention_sizes: dict[str, tuple[int, ...]]
    head: HeadShape
    rows: tuple[int, ...]


def by_rows(shapes: list[HeadShape]) -> dict[str, HeadShape]:
    """By their number of rows; of several with as many, all but the first also by the vocabulary."""
    named = {}
    for shape in shapes:
        name = str(shape.rows)
        named[f"{name}-V{shape.vocab_size}" if name in named else name] = shape
    return named


TRAINING_STEP = {
    "cpu": TrainingShape(256, 4, 8, 2, 896, 32002, 2, 128, 2, 9, 4, torch.float32, target=6),
    "cuda": TrainingShape(1024, 12, 16, 4, 3584, 32002, 2, 512, 2, 9, 4, torch.bfloat16, target=None),
}
# One position of a document thinks, as in RLP (arXiv 2510.01265), which predicts one token. The head has about a fifth
# of the weights, as that of Qwen3-1.7B.
RLP_STEP = {
    "cpu": TrainingShape(512, 1, 8, 2, 1792, 2002, 1, 2048, 16, 512, 1, torch.float32, target=3),
    "cuda": TrainingShape(1024, 12, 16, 4, 3584, 32002, 1, 2048, 16, 512, 1, torch.bfloat16, target=None),
}
THOUGHT_ATTENTION = {
    "cpu": ThoughtAttentionShape(1, 512, 12, 8, 2, 64, torch.float32, target=9),
    "cuda": ThoughtAttentionShape(1, 2048, 14, 32, 8, 128, torch.bfloat16, target=None),
}
_SMALL = {"heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": torch.float32, "batch": 1, "target": None}
_LARGE = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": torch.bfloat16, "batch": 1, "target": None}
DRAFT_TRAINING = {
    "cpu": {
        "EAGLE-3, 7 steps": DraftShape(
            length=256, anchors=256, queries=1, steps=(1, 2, 3, 4, 5, 6, 7), causal=True, **_SMALL
        ),
        "DFlash, blocks of 16": DraftShape(
            length=2048, anchors=512, queries=16, steps=(16,), causal=False, **_SMALL | {"target": 3}
        ),
        "RLP, 16 thoughts of 256": DraftShape(length=256, anchors=16, queries=256, steps=(256,), causal=True, **_SMALL),
    },
    "cuda": {
        **{
            f"EAGLE-3, 7 steps, L = {length}": DraftShape(
                length=length, anchors=length, queries=1, steps=(1, 2, 3, 4, 5, 6, 7), causal=True, **_LARGE
            )
            for length in (2048, 8192, 32768)
        },
        **{
            f"DFlash, blocks of {block}, L = {length}": DraftShape(
                length=length, anchors=512, queries=block, steps=(block,), causal=False, **_LARGE
            )
            for block in (8, 16)
            for length in (2048, 8192, 32768)
        },
        **{
            f"RLP, 16 thoughts of {steps}": DraftShape(
                length=2048, anchors=16, queries=steps, steps=(steps,), causal=True, **_LARGE
            )
            for steps in (512, 2048)
        },
    },
}
LINEAR_CROSS_ENTROPY = {
    "cpu": [HeadShape(4096, 512, 32002, torch.float32), HeadShape(1024, 512, 128256, torch.float32)],
    "cuda": [
        HeadShape(2048, 4096, 32000, torch.bfloat16),
        HeadShape(16384, 4096, 32000, torch.bfloat16),
        HeadShape(2048, 4096, 128256, torch.bfloat16),
        HeadShape(2048, 4096, 152064, torch.bfloat16),
    ],
}
MIXED_LINEAR_CROSS_ENTROPY = LINEAR_CROSS_ENTROPY | {"cpu": [HeadShape(512, 512, 32002, torch.float32)]}
# As many rows as one step of generation draws, and as one step of sampled thoughts.
LINEAR_SAMPLE = {
    "cpu": [HeadShape(8, 512, 32002, torch.float32), HeadShape(512, 512, 32002, torch.float32)],
    "cuda": [
        *(HeadShape(rows, 4096, 32000, torch.bfloat16) for rows in (8, 128, 2048, 16384)),
        *(HeadShape(rows, 4096, size, torch.bfloat16) for size in (128256, 152064) for rows in (8, 2048)),
    ],
}
MIXING = {
    "cpu": [LogitsShape(2048, 32002, torch.float32)],
    "cuda": [LogitsShape(2048, 32000, torch.bfloat16), LogitsShape(16384, 32002, torch.bfloat16)],
}
SCALING = {
    "cpu": ScalingShape(
        ThoughtAttentionShape(1, 128, 8, 4, 2, 64, torch.float32, target=None),
        {"length": (64, 128, 256, 512), "steps": (4, 8, 16, 32), "thoughts": (1, 2, 4)},
        HeadShape(0, 128, 32002, torch.float32),
        (256, 512, 1024, 2048),
    ),
    "cuda": ScalingShape(
        ThoughtAttentionShape(1, 512, 14, 32, 8, 128, torch.bfloat16, target=None),
        {"length": (256, 512, 1024, 2048, 4096), "steps": (4, 8, 16, 32), "thoughts": (1, 2, 4)},
        HeadShape(0, 4096, 32000, torch.bfloat16),
        (1024, 2048, 4096, 8192, 16384),
    ),
}
