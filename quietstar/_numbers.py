"""Checks of numbers given by users: fields of a configuration, flags of a command, arguments of a function."""

import math
from collections.abc import Mapping
from numbers import Integral, Real


class Interval:
    """An interval of valid numbers, in mathematical notation. NaN, infinities and booleans are never valid.

    >>> Interval(float, "(0, 1]").check("share", 0.5)
    >>> Interval(int, "[1, inf)").check("batch", 0)
    ValueError: batch must be an integer >= 1, got 0
    """

    def __init__(self, kind: type[int] | type[float], bounds: str):
        self.kind, self.bounds = kind, bounds
        self.low, self.high = map(float, bounds[1:-1].split(","))

    def __contains__(self, value: float) -> bool:
        # NaN fails these comparisons.
        above = value > self.low if self.bounds[0] == "(" else value >= self.low
        return above and (value < self.high if self.bounds[-1] == ")" else value <= self.high)

    def __str__(self) -> str:
        bounds = f"in {self.bounds}"
        if self.high == math.inf:
            bounds = f"{'>' if self.bounds[0] == '(' else '>='} {self.low:g}"
        return f"an integer {bounds}" if self.kind is int else bounds

    def check(self, name: str, value: object) -> None:
        """Check one number, called ``name`` in the message.

        Raises:
            TypeError: the value is not a number of this kind.
            ValueError: it is outside the interval.
        """
        if isinstance(value, bool) or not isinstance(value, Integral if self.kind is int else Real):
            raise TypeError(f"{name} must be {'' if self.kind is int else 'a number '}{self}, got {value!r}")
        if value not in self:
            wanted = "finite" if abs(value) == math.inf else self
            raise ValueError(f"{name} must be {wanted}, got {value}")


def check_numbers(intervals: Mapping[str, Interval], values: Mapping[str, object], prefix: str = "") -> None:
    """Check those ``values`` whose names are in ``intervals``; None (not given) is skipped."""
    for name, interval in intervals.items():
        if (value := values.get(name)) is not None:
            interval.check(prefix + name, value)


SEED = Interval(int, "[0, 4294967295]")  # NumPy's range of seeds
