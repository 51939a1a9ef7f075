"""When to think and how much to draft: the valid values, and the defaults for calls that do not set them.

Pipelines, servers and evaluation harnesses cannot pass every argument on to ``generate``, so a model can set its own
defaults: in ``model.generation_config``, or in the fields ``think``, ``gain_threshold`` and ``draft_length`` of its
configuration.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

DEFAULT = "default"

Think = float | Literal["always", "never", "learned"]


def check_think(value: object) -> None:
    """Check a value of ``think``.

    Raises:
        TypeError, ValueError: it is neither one of the words nor a number of nats.
    """
    if value in ("always", "never", "learned"):
        return
    wanted, other = "think must be 'always', 'never' or a threshold in nats >= 0", "or 'learned', with a gain head"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{wanted}, got {value!r}; {other}")
    if not value >= 0:
        raise ValueError(f"{wanted}, got {value}; {other}")


def check_gain_threshold(value: object) -> None:
    """Check a value of ``gain_threshold``.

    Raises:
        TypeError, ValueError: it is not a finite number.
    """
    wanted = "gain_threshold must be a finite number of nats"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{wanted}, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{wanted}, got {value}")


def check_draft_length(value: object) -> None:
    """Check a value of ``draft_length``.

    Raises:
        TypeError, ValueError: it is neither None nor "auto" nor a number of tokens.
    """
    if value in (None, "auto"):
        return
    wanted = "draft_length must be None, 'auto' or an integer >= 1"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{wanted}, got {value!r}")
    if value < 1:
        raise ValueError(f"{wanted}, got {value}")


CHECKS: dict[str, Callable[[object], None]] = {
    "think": check_think,
    "gain_threshold": check_gain_threshold,
    "draft_length": check_draft_length,
}


def check_defaults(source: object) -> None:
    """Check the values of these options that a configuration sets, if any.

    Raises:
        TypeError, ValueError: ``generate`` does not accept a value.
    """
    for name, check in CHECKS.items():
        if hasattr(source, name):
            check(getattr(source, name))


def choose(name: str, given: Any, *sources: object) -> Any:
    """Return ``given`` unless it is "default"; then the attribute ``name`` of the first of the sources that has it."""
    if given != DEFAULT:
        return given
    return next(getattr(source, name) for source in sources if hasattr(source, name))
