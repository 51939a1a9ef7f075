"""How the producer and the consumers of ``gluon_forward`` wait for one another, as a model that any machine runs.

Each is a generator that stops at every wait and at every point where another may be faster; loads end at random. In no
order may they wait for ever, read another block than theirs, or load over one that is read.
"""

import itertools
import random

import pytest


class Mbarrier:
    """Turns to its next phase when all arrivals, and all that was expected to be loaded, are there."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.phase = self.loading = 0

    def arrive(self, expected: int = 0) -> None:
        self.pending -= 1
        self.loading += expected
        assert self.pending >= 0, "an arrival too many"
        self._turn()

    def loaded(self) -> None:
        self.loading -= 1
        self._turn()

    def _turn(self) -> None:
        if self.pending == self.loading == 0:
            self.phase ^= 1
            self.pending = self.count

    def wait(self, parity: int):
        while self.phase == parity:
            yield


class Ring:
    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.full, self.empty = ([Mbarrier(count) for _ in range(stages)] for count in (1, 2))
        self.blocks, self.readers = [None] * stages, [0] * stages

    def wait_full(self, i):
        yield from self.full[i % self.stages].wait(i // self.stages & 1)

    def begin_fill(self, i, in_flight):
        yield from self.empty[i % self.stages].wait(i // self.stages & 1 ^ 1)
        assert self.readers[i % self.stages] == 0, "loaded over what is read"
        self.blocks[i % self.stages] = None
        self.full[i % self.stages].arrive(expected=1)
        in_flight.append((self, i))

    def end_fill(self, i):
        self.blocks[i % self.stages] = i
        self.full[i % self.stages].loaded()

    def begin_read(self, i):
        assert self.blocks[i % self.stages] == i, "another block"
        self.readers[i % self.stages] += 1

    def release(self, i):
        self.readers[i % self.stages] -= 1
        self.empty[i % self.stages].arrive()


def producer(keys, values, count, in_flight):
    for i in range(count + 1):
        if i < count:
            yield from keys.begin_fill(i, in_flight)
            yield
        if i > 0:
            yield from values.begin_fill(i - 1, in_flight)
            yield


def consumer(which, keys, values, thoughts, count, turns, order):
    for i in range(count):
        yield from keys.wait_full(i)
        yield from turns[which].wait(i & 1)
        keys.begin_read(i)
        if i > thoughts:
            values.begin_read(i - 1)
        order.append((i, which))
        yield
        turns[1 - which].arrive()
        yield
        keys.release(i)
        yield
        yield from values.wait_full(i)
        if i < thoughts:
            values.begin_read(i)
            yield
            values.release(i)
        elif i > thoughts:
            yield
            values.release(i - 1)
    values.begin_read(count - 1)


def run(seed: int, stages: int, thoughts: int, blocks: int) -> None:
    draw = random.Random(seed)
    count = thoughts + blocks
    keys, values = Ring(stages), Ring(stages)
    turns, in_flight, order = [Mbarrier(1), Mbarrier(1)], [], []
    turns[0].arrive()
    running = [
        producer(keys, values, count, in_flight),
        *(consumer(which, keys, values, thoughts, count, turns, order) for which in range(2)),
    ]
    speeds = {part: draw.choice([1, 1, 5, 20]) for part in running}
    for _ in range(4000):
        if in_flight and draw.random() < 0.3:
            ring, i = in_flight.pop(draw.randrange(len(in_flight)))
            ring.end_fill(i)
        part = draw.choices(running, [speeds[part] for part in running])[0]
        if next(part, "end") == "end":
            running.remove(part)
        if not running:
            assert order == list(itertools.product(range(count), range(2)))  # in turns
            return
    raise AssertionError("they wait for ever")


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(("thoughts", "blocks"), [(1, 1), (1, 2), (1, 9), (2, 3), (4, 8)])
def test_no_order_is_wrong(stages, thoughts, blocks):
    for seed in range(25):
        run(seed, stages, thoughts, blocks)


def test_one_stage_is_not_enough():
    with pytest.raises(AssertionError, match="for ever"):
        run(0, 1, 1, 3)


def test_a_release_too_early_is_seen(monkeypatch):
    def too_early(ring, i):
        assert ring.blocks[i % ring.stages] == i
        ring.readers[i % ring.stages] += 1
        ring.empty[i % ring.stages].arrive()

    monkeypatch.setattr(Ring, "begin_read", too_early)
    monkeypatch.setattr(Ring, "release", lambda ring, i: ring.readers.__setitem__(i % ring.stages, 0))
    with pytest.raises(AssertionError, match=r"loaded over|another block"):
        test_no_order_is_wrong(1, 9, 2)
