"""Sampling from a linear head: the same seed gives the same tokens on every backend and tiling."""

from quietstar.ops.linear_sample.api import draw, linear_sample

__all__ = ["draw", "linear_sample"]
