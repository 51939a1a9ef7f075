"""Tokenwise-parallel thought attention: every anchor attends to the shared base keys and to its own thought."""

from quietstar.ops.thought_attention.api import thought_attention

__all__ = ["thought_attention"]
