"""Tokenwise-parallel thought attention: base keys shared by all anchors, plus each anchor's own thought."""

from quietstar.ops.thought_attention.api import thought_attention

__all__ = ["thought_attention"]
