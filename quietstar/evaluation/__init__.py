"""Measuring what thoughts do."""

from quietstar.evaluation.controls import random_thoughts, shuffle_thoughts
from quietstar.evaluation.held_out import HeldOutNll, held_out_nll, text_nll
from quietstar.evaluation.likeliest import Likeliest, likeliest_tokens
from quietstar.evaluation.means import (
    Gain,
    Mean,
    gain,
    gain_by_difficulty,
    gain_by_position,
    gain_by_token,
    hardest,
    token_mean,
)
from quietstar.evaluation.score import TextScore, score

__all__ = [
    "Gain",
    "HeldOutNll",
    "Likeliest",
    "Mean",
    "TextScore",
    "gain",
    "gain_by_difficulty",
    "gain_by_position",
    "gain_by_token",
    "hardest",
    "held_out_nll",
    "likeliest_tokens",
    "random_thoughts",
    "score",
    "shuffle_thoughts",
    "text_nll",
    "token_mean",
]
