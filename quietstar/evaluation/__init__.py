"""Measuring what thoughts do."""

from quietstar.evaluation.held_out import HeldOutNll, Mean, hardest, held_out_nll, token_mean

__all__ = ["HeldOutNll", "Mean", "hardest", "held_out_nll", "token_mean"]
