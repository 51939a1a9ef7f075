"""Mixing of two predictions given as logits, and the cross-entropy of the mix without storing the mix."""

from quietstar.ops.mixing.api import mix_logits, mixed_cross_entropy

__all__ = ["mix_logits", "mixed_cross_entropy"]
