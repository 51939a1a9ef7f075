"""Autograd ops of Quiet-STaR, usable by any trainer: only torch is needed."""

from quietstar.ops.linear_cross_entropy import linear_cross_entropy, mixed_linear_cross_entropy
from quietstar.ops.linear_sample import linear_sample
from quietstar.ops.mixing import mix_logits, mixed_cross_entropy
from quietstar.ops.thought_attention import thought_attention

__all__ = [
    "linear_cross_entropy",
    "linear_sample",
    "mix_logits",
    "mixed_cross_entropy",
    "mixed_linear_cross_entropy",
    "thought_attention",
]
