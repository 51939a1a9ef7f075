"""Measuring what thoughts do."""

from quietstar.evaluation.held_out import HeldOutNll, Mean, hardest, held_out_nll, token_mean
from quietstar.evaluation.score import TextScore, score

__all__ = ["HeldOutNll", "Mean", "TextScore", "hardest", "held_out_nll", "score", "token_mean"]
