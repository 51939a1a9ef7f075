"""Cross-entropy of a linear head, on plain or mixed hidden states, without ever storing the logits of all rows."""

from quietstar.ops.linear_cross_entropy.api import linear_cross_entropy, mixed_linear_cross_entropy

__all__ = ["linear_cross_entropy", "mixed_linear_cross_entropy"]
