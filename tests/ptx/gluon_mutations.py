"""Kernels in Gluon whose PTX is broken one instruction at a time."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType

from . import triton_launches
from .kernel import EmulationError
from .launches import Emulated, schedule

Mutation = Callable[[str], Iterator[tuple[int, str]]]
"""Of every occurrence of something in PTX: where it is, and the text with that one replaced."""


def each(pattern: str, replacement: str | Callable = "") -> Mutation:
    def broken(ptx: str):
        for match in re.finditer(pattern, ptx, re.M):
            new = replacement(match) if callable(replacement) else match.expand(replacement)
            yield match.start(), ptx[: match.start()] + new + ptx[match.end() :]

    return broken


class Subject:
    """A kernel that is right, and what becomes of it when its PTX is broken.

    Args:
        module: where its source is.
        run: launches it and raises AssertionError if the numbers are wrong.
        launches: those of the test, of which ``run`` makes one.
    """

    ORDERS = (3, 4, 5, 14, 16)  # the last two for what is rare

    def __init__(self, module: ModuleType, run: Callable, launches: list[Emulated]) -> None:
        self.run, self.launches = run, launches
        run()
        assert launches[-1].faults() == []
        self.ptx = launches.pop().kernel.module.text
        self.file = module.__name__.rpartition(".")[2] + ".py"
        self.source = module.__loader__.get_source(module.__name__).splitlines()

    def is_caught(self, ptx: str) -> bool:
        """Whether anything shows that it is broken, in one of the orders."""
        triton_launches.state.edit = lambda kernel, original: ptx
        try:
            for schedule.order in self.ORDERS:
                self.launches.clear()
                self.run()
                if any(launch.faults() for launch in self.launches):
                    return True
        except (AssertionError, EmulationError):
            return True
        finally:
            triton_launches.state.edit = None
            self.launches.clear()
        return False

    def missed(self, mutation: Mutation) -> Counter:
        """How many of them are not caught, by line of the source."""
        broken = list(mutation(self.ptx))
        assert broken, "nothing to break"
        missed = Counter(self._line(place) for place, ptx in broken if not self.is_caught(ptx))
        print(f"{len(broken) - missed.total()} of {len(broken)} caught, not", dict(missed))
        return missed

    def _line(self, place: int) -> str:
        before = self.ptx[:place]
        assembly = before.rfind("// begin inline asm")
        if assembly > before.rfind("// end inline asm"):  # where .loc counts the lines of the text
            before = before[:assembly]
        lines = re.findall(rf"^\s*\.loc.*{re.escape(self.file)}:([1-9]\d*)", before, re.M)
        return self.source[int(lines[-1]) - 1].strip()
