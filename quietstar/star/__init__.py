"""STaR (arXiv 2203.14465): trains a model on those of its own rationales that led to right answers."""

from quietstar.star.prompts import Example, Format, Problem, problems_of, read_examples
from quietstar.star.rationales import Rationale, Writer
from quietstar.star.rounds import NothingRightError, Settings, star

__all__ = [
    "Example",
    "Format",
    "NothingRightError",
    "Problem",
    "Rationale",
    "Settings",
    "Writer",
    "problems_of",
    "read_examples",
    "star",
]
