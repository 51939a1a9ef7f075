"""The search for the fastest rows of launch-parameter tables within a time limit (command: :mod:`quietstar.ops.tune`).

Most of the time goes into compiling. So candidates are processed in waves: the kernels of a wave are compiled in
parallel, then each candidate is checked and timed by itself. A wave takes candidates from all subjects in turn, each
time the row nearest to the subject's fastest so far.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from torch import Tensor

Row = tuple[int, ...]
"""A row of launch parameters: a named tuple of positive numbers."""

# Bound on the relative difference of two correct results in half precision, or on the share of tokens that differ. A
# wrong result is off by about 1.
_TOLERANCE = 0.02
# Share of the time for which a wave may compile; candidates that take longer are left out.
_WAVE = 1 / 6


class Subject(NamedTuple):
    """A row of a table, and how to find a better one."""

    table: str
    """Module and name of the table."""
    rows: dict
    """The table itself."""
    key: tuple[str | int, ...] | int
    kernel: str
    """The function whose launch parameters these are."""
    present: Row
    """The row used now, perhaps under a key for any architecture."""
    candidates: Sequence[Row]
    run: Callable[[], Iterable[Tensor]]
    """The call to time, a typical one that the kernel dominates; returns its results."""
    flops: float = 0
    """FLOPs of the call; 0 if it is bound by memory."""
    moved: float = 0
    """Bytes that the call has to read and write."""
    checked: Callable[[], Iterable[Tensor]] | None = None
    """Computes the same results as ``run``, for calls of ``run`` that overwrite their input."""

    def results(self) -> list[Tensor]:
        """Compute the results of the call."""
        return list((self.checked or self.run)())


class Outcome(NamedTuple):
    """The outcome of a call that was run."""

    results: list[Tensor]
    spilled: int
    """The largest number of registers that a thread spills in any of its kernels."""
    kernels: set[str]
    """Names of the kernels that it launched."""


class Machine(Protocol):
    """What runs the candidates."""

    together: int
    """How many kernels are compiled at the same time."""

    def now(self) -> float:
        """Seconds on some clock."""

    def compile(self, wave: Sequence[tuple[Subject, Row]], seconds: float) -> list[bool]:
        """Compile what the calls would launch, and return which of them are ready within the time."""

    def outcome(self, subject: Subject) -> Outcome:
        """Run the subject's call; raises TritonError or RuntimeError if it fails."""

    def milliseconds(self, subject: Subject) -> float:
        """Measure the median time of the call."""


@contextmanager
def in_table(subject: Subject, row: Row) -> Iterator[None]:
    """Put ``row`` into the table inside the context."""
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
    """The state of the search for one subject: which rows were tried, and their times."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.times: dict[Row, float] = {}
        """Milliseconds of the rows that give correct results, the present row first."""
        self.failure: str | None = None
        """Why the present row could not be timed."""
        self.tried = 0
        self._waiting = [subject.present, *(row for row in subject.candidates if row != subject.present)]
        self._expected: Outcome | None = None

    @property
    def best(self) -> Row:
        """The fastest row."""
        return min(self.times, key=self.times.__getitem__, default=self.subject.present)

    @property
    def waiting(self) -> int:
        """How many rows are left to try; 0 if the present row failed, since there is nothing to compare them with."""
        return 0 if self.failure else len(self._waiting)

    def next(self) -> Row:
        """Return the row to try next: the present one first, then the one nearest to the fastest."""
        best = self.best
        row = min(self._waiting, key=lambda row: _distance(row, best))
        self._waiting.remove(row)
        self.tried += 1
        return row

    def time(self, row: Row, machine: Machine) -> None:
        """Time a compiled row, unless it fails, spills more than the present row or gives a wrong result."""
        from triton.errors import TritonError

        with in_table(self.subject, row):
            try:
                outcome = machine.outcome(self.subject)
                if row == self.subject.present:
                    self._expected = outcome
                    if self.subject.kernel not in outcome.kernels:  # on this GPU the op uses another kernel
                        self.missed(row, f"a typical call does not launch {self.subject.kernel} here")
                        return
                elif outcome.spilled > self._expected.spilled or not all(
                    map(_same, outcome.results, self._expected.results)
                ):
                    return
                self.times[row] = machine.milliseconds(self.subject)
            except (TritonError, RuntimeError) as error:  # RuntimeError includes out of memory
                self.missed(row, str(error).partition("\n")[0])

    def missed(self, row: Row, reason: str) -> None:
        """Note that a row could not be timed."""
        if row == self.subject.present:
            self.failure = reason

    def line(self) -> str:
        """The table's line for the fastest row, with its measurements; a comment if nothing was measured."""
        subject, best = self.subject, self.best
        key = str(subject.key)
        if isinstance(subject.key, tuple):  # strings are printed as the names of their constants
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
    """Try rows until none is left or the time is up. The tables are restored afterwards.

    Present rows come first. Rows that do not compile in time, do not fit the device, give another result or spill more
    registers than the present one are left out.

    Args:
        subjects: what to tune.
        seconds: total time limit; a row that is being timed when it ends is finished.
        machine: runs the candidates.
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
    """Yield the next rows to try, each from the trial with the fewest tried so far."""
    for _ in range(size):
        waiting = [trial for trial in trials if trial.waiting and (trial.times or not trial.tried)]
        if not waiting:
            return
        trial = min(waiting, key=lambda trial: trial.tried)
        yield trial, trial.next()


def _distance(row: Row, other: Row) -> float:
    """How many doublings and halvings of single numbers lead from one row to the other."""
    return sum(abs(math.log2(a / b)) for a, b in zip(row, other, strict=True))


def _same(actual: Tensor, expected: Tensor) -> bool:
    """Whether two results differ only by rounding."""
    if not expected.is_floating_point():
        return (actual != expected).float().mean().item() <= _TOLERANCE
    difference = (actual.float() - expected.float()).norm()
    return bool(difference <= _TOLERANCE * expected.float().norm())
