"""Which rows of tables of launch parameters are the fastest, within a time; :mod:`quietstar.ops.tune` is the command.

Compiling takes most of the time. So candidates are taken in waves, whose kernels compile at the same time, before each
candidate is checked and timed by itself. A wave takes from the kernels in turn, so that all get on alike: of each the
row that is nearest to its fastest so far.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from torch import Tensor

Row = tuple[int, ...]
"""A named tuple of positive numbers."""

# Of two right results in half precision, generously: their relative difference, or the share of tokens that differ. A
# wrong one is off by about 1.
_TOLERANCE = 0.02
# Of the time, that a wave of candidates may compile: what takes longer is left out.
_WAVE = 1 / 6


class Subject(NamedTuple):
    """A row of a table, and how to find a better one."""

    table: str
    """What the table is called: its module and name."""
    rows: dict
    """The table itself."""
    key: tuple[str | int, ...] | int
    kernel: str
    """The function whose launch parameters these are."""
    present: Row
    """What stands there now, perhaps under a key for any architecture."""
    candidates: Sequence[Row]
    run: Callable[[], Iterable[Tensor]]
    """A typical call, which the kernel dominates, to be timed; returns what it computed."""
    flops: float = 0
    """Of the call; 0 if memory bounds it."""
    moved: float = 0
    """Bytes that the call has to read and write."""
    checked: Callable[[], Iterable[Tensor]] | None = None
    """Computes what ``run`` does, where that overwrites its own input."""

    def results(self) -> list[Tensor]:
        """What the call computes."""
        return list((self.checked or self.run)())


class Outcome(NamedTuple):
    """Of a call that was run."""

    results: list[Tensor]
    spilled: int
    """The most registers that a thread spills in a kernel of it."""
    kernels: set[str]
    """The functions that it launched."""


class Machine(Protocol):
    """What runs the candidates."""

    together: int
    """How many are compiled at the same time."""

    def now(self) -> float:
        """Seconds on some clock."""

    def compile(self, wave: Sequence[tuple[Subject, Row]], seconds: float) -> list[bool]:
        """Compile what the calls would launch; which of them are ready within the time."""

    def outcome(self, subject: Subject) -> Outcome:
        """Of the subject's call; TritonError or RuntimeError if it fails."""

    def milliseconds(self, subject: Subject) -> float:
        """The median time of the call."""


@contextmanager
def in_table(subject: Subject, row: Row) -> Iterator[None]:
    """``row`` in the table for a while."""
    kept = subject.rows.get(subject.key)
    subject.rows[subject.key] = row
    try:
        yield
    finally:
        if kept is None:
            del subject.rows[subject.key]
        else:
            subject.rows[subject.key] = kept


class Trial:
    """What is known of a subject's rows so far."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.times: dict[Row, float] = {}
        """Milliseconds of the rows that are right, the present one first."""
        self.failure: str | None = None
        """Why the present row has no time."""
        self.tried = 0
        self._waiting = [subject.present, *(row for row in subject.candidates if row != subject.present)]
        self._expected: Outcome | None = None

    @property
    def best(self) -> Row:
        """The fastest row."""
        return min(self.times, key=self.times.__getitem__, default=self.subject.present)

    @property
    def waiting(self) -> int:
        """How many rows were not tried yet; none where there is nothing to compare them with."""
        return 0 if self.failure else len(self._waiting)

    def next(self) -> Row:
        """The row to try next: the present one, then the nearest to the fastest."""
        best = self.best
        row = min(self._waiting, key=lambda row: _distance(row, best))
        self._waiting.remove(row)
        self.tried += 1
        return row

    def time(self, row: Row, machine: Machine) -> None:
        """Time a row that is compiled, unless it fails, spills more than the present one or is wrong."""
        from triton.errors import TritonError

        with in_table(self.subject, row):
            try:
                outcome = machine.outcome(self.subject)
                if row == self.subject.present:
                    self._expected = outcome
                    if self.subject.kernel not in outcome.kernels:  # another one is better here
                        self.missed(row, f"a typical call does not launch {self.subject.kernel} here")
                        return
                elif outcome.spilled > self._expected.spilled or not all(
                    map(_same, outcome.results, self._expected.results)
                ):
                    return
                self.times[row] = machine.milliseconds(self.subject)
            except (TritonError, RuntimeError) as error:  # the second: also out of memory
                self.missed(row, str(error).partition("\n")[0])

    def missed(self, row: Row, reason: str) -> None:
        """A row could not be timed."""
        if row == self.subject.present:
            self.failure = reason

    def line(self) -> str:
        """The line of the table that sets the fastest row, with what was measured; a comment if nothing was."""
        subject, best = self.subject, self.best
        key = str(subject.key)
        if isinstance(subject.key, tuple):  # of names, which are constants, and numbers
            parts = (part.replace(" ", "_").upper() if isinstance(part, str) else str(part) for part in subject.key)
            key = f"({', '.join(parts)})"
        if not self.times:
            return f"    # {key}: not timed, {self.failure or 'no time was left'}"
        milliseconds = self.times[best]
        if subject.flops:
            speed = f"{subject.flops / milliseconds / 1e9:.4g} TFLOP/s"
        else:
            speed = f"{subject.moved / milliseconds / 1e6:.4g} GB/s"
        measured = f"{milliseconds:.4g} ms, {speed}"
        if best != subject.present:
            measured += f"; {self.times[subject.present]:.4g} with {tuple(subject.present)}"
        return f"    {key}: {type(best).__name__}({', '.join(map(str, best))}),  # {measured}"


def search(subjects: Sequence[Subject], seconds: float, machine: Machine) -> list[Trial]:
    """Try rows until there is none left, or no time; the tables are afterwards as they were.

    Present rows come first. Rows that do not compile in time, do not fit the device, give another result or spill more
    registers than the present one are left out.

    Args:
        subjects: what to tune.
        seconds: for all; the row that is timed when they end is the last.
        machine: what runs the candidates.
    """
    end = machine.now() + seconds
    trials = [Trial(subject) for subject in subjects]
    while machine.now() < end and any(trial.waiting for trial in trials):
        wave = list(_wave(trials, machine.together))
        left = end - machine.now()
        if all(trial.times for trial, _ in wave):
            left = min(left, _WAVE * seconds)
        ready = machine.compile([(trial.subject, row) for trial, row in wave], left)
        for (trial, row), compiled in zip(wave, ready, strict=True):
            if not compiled:
                trial.missed(row, "it does not compile, or not in time")
            elif machine.now() < end:
                trial.time(row, machine)
    return trials


def _wave(trials: Sequence[Trial], size: int) -> Iterator[tuple[Trial, Row]]:
    """The next rows, of those trials in which the fewest were tried."""
    for _ in range(size):
        waiting = [trial for trial in trials if trial.waiting and (trial.times or not trial.tried)]
        if not waiting:
            return
        trial = min(waiting, key=lambda trial: trial.tried)
        yield trial, trial.next()


def _distance(row: Row, other: Row) -> float:
    """How many times some number is doubled or halved from one row to the other."""
    return sum(abs(math.log2(a / b)) for a, b in zip(row, other, strict=True))


def _same(actual: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by rounding only."""
    if not expected.is_floating_point():
        return (actual != expected).float().mean().item() <= _TOLERANCE
    difference = (actual.float() - expected.float()).norm()
    return bool(difference <= _TOLERANCE * expected.float().norm())
