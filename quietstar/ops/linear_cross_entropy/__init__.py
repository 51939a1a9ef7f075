"""Cross-entropy of a linear head, plain or on mixed hidden states, without ever holding the logits of all rows."""

from quietstar.ops.linear_cross_entropy.api import linear_cross_entropy, mixed_linear_cross_entropy

__all__ = ["linear_cross_entropy", "mixed_linear_cross_entropy"]
