"""Measurements of what thoughts do: on held-out text, on questions with answers, and token by token."""

from quietstar.evaluation.answers import AnswerProbabilities, answer_probabilities
from quietstar.evaluation.curve import CurvePoint, thinking_curve
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
from quietstar.evaluation.said import greedy_answers, majority, sampled_answers
from quietstar.evaluation.score import TextScore, score
from quietstar.evaluation.tasks import Question, Task, load_task
from quietstar.models.controls import random_thoughts, shuffle_thoughts

__all__ = [
    "AnswerProbabilities",
    "CurvePoint",
    "Gain",
    "HeldOutNll",
    "Likeliest",
    "Mean",
    "Question",
    "Task",
    "TextScore",
    "answer_probabilities",
    "gain",
    "gain_by_difficulty",
    "gain_by_position",
    "gain_by_token",
    "greedy_answers",
    "hardest",
    "held_out_nll",
    "likeliest_tokens",
    "load_task",
    "majority",
    "random_thoughts",
    "sampled_answers",
    "score",
    "shuffle_thoughts",
    "text_nll",
    "thinking_curve",
    "token_mean",
]
