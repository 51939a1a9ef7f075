"""The machine code of a kernel's loops for Hopper, and how long an iteration takes by a model of one multiprocessor.

The model knows four things: matrix products queue for the matrix units and run on their own; what a warp group does
itself takes the longest of its units; a wait lasts until what it waits for is done; a barrier lasts until everybody is
there. Whether the softmax runs under the products is thus read from where ptxas has put products and waits.

What the numbers are, per multiprocessor and cycle, and where they are from:

- matrix units, 4096 FLOP; exponentials, 16; float32, 128; integers, comparisons and conversions, 64; instructions of
  warps, 4: ``tests/ptx/units.py``, which names NVIDIA's documents. ``HMMA`` gets two thirds of the matrix units.
- L2 cache, 48 bytes: the white paper on the A100 (5120 bytes, 108 multiprocessors); none is stated for Hopper.
- Latencies in cycles, of what a warp group has to wait for anyway: 60 of a product, 30 of a barrier, 23 of a shuffle,
  270 of the L2 cache. Of the size that microbenchmarks of Hopper find; none of them decides anything here.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

FLOP, L2_BYTES = 4096, 48
PRODUCT_LATENCY, BARRIER_LATENCY, SHUFFLE_LATENCY, L2_LATENCY = 60, 30, 23, 270

# Cycles of a scheduler's unit for an instruction of a warp: 32 lanes over a fourth of the multiprocessor's.
_UNITS = {"exp": 8, "float": 1, "other": 2, "hmma": 6}
_KINDS = {
    "exp": ("MUFU",),
    "float": ("FADD", "FFMA", "FMUL", "IMAD"),
    "hmma": ("HMMA",),
    # On the scalar path, or none of the units that count here: these only have to be issued.
    "issue": ("U", "R2UR", "BRA", "LDS", "STS", "LDG", "STG", "LD", "BAR", "SYNCS", "WARPGROUP", "HGMMA", "DEPBAR",
              "FENCE", "MEMBAR", "NOP", "ELECT", "SHFL", "B"),
}  # fmt: skip

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*\w+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?(.*?)\s*;")
_BRANCH = re.compile(r"^BRA.*`\((\.L_x_\d+)\)")
_PRODUCT = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.")


class Step(NamedTuple):
    """Something that a warp group does in a loop."""

    kind: str
    """work, product, products_done, copy, copies_done or barrier."""
    amount: float = 0
    """Cycles of work, FLOP of a product, bytes of a copy; how many groups may still run behind a wait."""
    whole_block: bool = False
    """Whether a barrier is for all warp groups."""


class Loop(NamedTuple):
    """Of machine code, without loops in it."""

    counts: Counter
    """Of instructions."""
    steps: tuple[Step, ...]

    @property
    def size(self) -> int:
        """Instructions."""
        return sum(self.counts.values())

    @property
    def flop(self) -> float:
        """Of the products of one warp group in an iteration."""
        return sum(step.amount for step in self.steps if step.kind == "product")

    @property
    def products(self) -> int:
        """Instructions of the matrix units (wgmma)."""
        return sum(step.kind == "product" for step in self.steps)

    @property
    def exponentials(self) -> int:
        """Instructions of a warp."""
        return self.counts["MUFU.EX2"]

    @property
    def spills(self) -> int:
        """Accesses to the stack."""
        return sum(count for name, count in self.counts.items() if name.startswith(("LDL", "STL")))

    @property
    def divides(self) -> bool:
        """Whether integers are divided: by the thought steps, to find out whose key is whose."""
        return self.counts["I2F.RP"] + self.counts["I2F.U32.RP"] + self.counts["I2F"] > 0

    def products_under_exponentials(self) -> int:
        """Groups of products that are in flight while the exponentials are made, at the least."""
        flying, least = 0, []
        for step in self.steps * 2:  # what an iteration leaves in flight is so in the next one
            if step.kind == "product":
                flying += step.whole_block
            elif step.kind == "products_done":
                flying = min(flying, int(step.amount))
            elif step.kind == "exponentials":
                least.append(flying)
        return min(least[len(least) // 2 :], default=0)


def instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of nvdisasm's text, and the places of labels."""
    found, labels = [], {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _INSTRUCTION.match(line):
            found.append(instruction[1])
    return found, labels


def loops(sass: str) -> list[Loop]:
    """The innermost loops with products in them, in their order."""
    code, labels = instructions(sass)
    spans = []
    for end, text in enumerate(code):
        branch = _BRANCH.match(text)
        if branch and labels.get(branch[1], end) < end:
            body = code[labels[branch[1]] : end + 1]
            if any("HGMMA" in x or x.startswith("HMMA") for x in body) and not any("EXIT" in x for x in body):
                spans.append((labels[branch[1]], end))
    innermost = [s for s in spans if not any(s[0] <= o[0] and o[1] <= s[1] and o != s for o in spans)]
    return [loop_of(code[begin : end + 1]) for begin, end in sorted(innermost)]


def loop_of(code: Sequence[str]) -> Loop:
    """From its instructions."""
    return Loop(Counter(text.split()[0] for text in code), tuple(_steps(code)))


def work(code: Sequence[str]) -> float:
    """Cycles that instructions take a scheduler for one warp: the longest of its units."""
    kinds = Counter(_kind(text) for text in code)
    return max([sum(kinds.values()), *(cycles * kinds[unit] for unit, cycles in _UNITS.items())])


def _kind(text: str) -> str:
    return next((kind for kind, names in _KINDS.items() if text.startswith(names)), "other")


def _steps(code: Sequence[str]) -> Iterator[Step]:
    run: list[str] = []

    def done() -> Iterator[Step]:
        if run:
            yield Step("work", work(run) + SHUFFLE_LATENCY * sum(x.startswith("SHFL") for x in run) / 2)
            if any(x.startswith("MUFU.EX2") for x in run):
                yield Step("exponentials")
            run.clear()

    copied = 0
    for text in code:
        if product := _PRODUCT.match(text):
            m, n, k = map(int, product.groups())
            yield from done()
            yield Step("product", 2 * m * n * k, "gsb0" in text)
        elif text.startswith("WARPGROUP.DEPBAR"):
            yield from done()
            yield Step("products_done", int(text.split()[-1], 16))
        elif text.startswith("LDGSTS"):
            copied += 16 if ".128" in text else 4
            run.append(text)
        elif text.startswith("LDGDEPBAR"):
            yield from done()
            yield Step("copy", 128 * copied)
            copied = 0
        elif text.startswith("DEPBAR.LE SB0"):
            yield from done()
            yield Step("copies_done", int(text.split()[-1], 16))
        elif text.startswith("BAR.SYNC"):
            yield from done()
            yield Step("barrier", 0, text.split()[-1] == "0x0")
        else:
            run.append(text)
    yield from done()


def iteration_cycles(loop: Loop, groups: int = 2, iterations: int = 24) -> float:
    """Cycles of an iteration when it has settled, with ``groups`` warp groups on a multiprocessor."""
    marks = _simulated([list(loop.steps) * iterations] * groups, len(loop.steps))
    half = iterations // 2
    return max(mark[-1] - mark[half] for mark in marks) / (len(marks[0]) - 1 - half)


def _simulated(programs: Sequence[list[Step]], length: int) -> list[list[float]]:
    """When each warp group ends each iteration of ``length`` steps.

    Groups are taken by the time that they have come to. Work of two groups at a time takes each of them twice as long:
    the schedulers are shared.
    """
    count = len(programs)
    now, place = [0.0] * count, [0] * count
    busy_until = [0.0] * count  # with own work
    products: list[list[float]] = [[] for _ in programs]
    copies: list[list[float]] = [[] for _ in programs]
    marks: list[list[float]] = [[] for _ in programs]
    matrix_free = memory_free = 0.0
    at_barrier: dict[int, float] = {}
    while any(place[g] < len(programs[g]) for g in range(count)):
        ready = [g for g in range(count) if g not in at_barrier and place[g] < len(programs[g])]
        group = min(ready, key=lambda g: now[g])
        step = programs[group][place[group]]
        if step.kind == "work":
            others = sum(max(0.0, busy_until[g] - now[group]) for g in range(count) if g != group)
            now[group] += step.amount + min(step.amount, others)
            busy_until[group] = now[group]
        elif step.kind == "product":
            matrix_free = max(matrix_free, now[group]) + step.amount / FLOP
            if step.whole_block:  # the last of its group
                products[group].append(matrix_free + PRODUCT_LATENCY)
        elif step.kind == "copy":
            memory_free = max(memory_free, now[group]) + step.amount / L2_BYTES
            copies[group].append(memory_free + L2_LATENCY)
        elif step.kind in ("products_done", "copies_done"):
            running = products[group] if step.kind == "products_done" else copies[group]
            behind = len(running) - int(step.amount)
            if behind > 0:
                now[group] = max(now[group], running[behind - 1])
                del running[:behind]
        elif step.kind == "barrier":
            now[group] += BARRIER_LATENCY
            if step.whole_block:
                at_barrier[group] = now[group]
        place[group] += 1
        if place[group] % length == 0:
            marks[group].append(now[group])
        if len(at_barrier) == sum(place[g] < len(programs[g]) or g in at_barrier for g in range(count)):
            for g in at_barrier:
                now[g] = max(at_barrier.values())
            at_barrier.clear()
    return marks
