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
    """How many times faster than the sequential program the step has to be, where a promise was made."""


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


TRAINING_STEP = {
    "cpu": TrainingShape(256, 4, 8, 2, 896, 32002, 2, 128, 2, 9, 4, torch.float32, target=6),
    "cuda": TrainingShape(1024, 12, 16, 4, 3584, 32002, 2, 512, 2, 9, 4, torch.bfloat16, target=None),
}
THOUGHT_ATTENTION = {
    "cpu": ThoughtAttentionShape(1, 512, 12, 8, 2, 64, torch.float32, target=9),
    "cuda": ThoughtAttentionShape(1, 2048, 14, 32, 8, 128, torch.bfloat16, target=None),
}
LINEAR_CROSS_ENTROPY = {
    "cpu": [HeadShape(4096, 512, 32002, torch.float32)],
    "cuda": [HeadShape(2048, 4096, 32000, torch.bfloat16), HeadShape(16384, 4096, 32000, torch.bfloat16)],
}
MIXED_LINEAR_CROSS_ENTROPY = LINEAR_CROSS_ENTROPY | {"cpu": [HeadShape(512, 512, 32002, torch.float32)]}
# As many rows as one step of generation draws, and as one step of sampled thoughts.
LINEAR_SAMPLE = {
    "cpu": [HeadShape(8, 512, 32002, torch.float32), HeadShape(512, 512, 32002, torch.float32)],
    "cuda": [HeadShape(rows, 4096, 32000, torch.bfloat16) for rows in (8, 128, 2048, 16384)],
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
