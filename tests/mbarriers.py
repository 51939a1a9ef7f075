"""Parts of a kernel that wait for one another by mbarriers, in every order that there is.

A part is a list of operations. ``explore`` has the parts and the TMA unit take their steps in all orders. None may have
them wait for ever, read another content of a place than they should, load over what a product still reads, or end with
something in flight.

Two simplifications lose no fault. Products begin as early and end as late as their group lets them, which is the worst:
nobody waits for those of another group. And all loads that an mbarrier waits for land together: those who wait for it
cannot tell, and those who do not are seen before any has landed.
"""

from collections.abc import Iterator
from typing import NamedTuple

Place = tuple[int, int | None]
"""Number of an allocation of shared memory, and which part of it; None if it is not used in parts."""


class Mbarrier(NamedTuple):
    """Turns to its next phase when all arrivals, and all that was expected to be loaded, are there."""

    count: int
    pending: int
    loading: int = 0
    phase: int = 0

    def after(self, arrivals: int = 0, loads: int = 0) -> "Mbarrier":
        """What it is when so many have arrived, and so many loads more are expected."""
        now = self._replace(pending=self.pending - arrivals, loading=self.loading + loads)
        assert now.pending >= 0, "an arrival too many"
        assert now.loading >= 0, "more was loaded than expected"
        if now.pending == now.loading == 0:
            return Mbarrier(self.count, self.count, 0, self.phase ^ 1)
        return now


class Wait(NamedTuple):
    """Until the phase of this parity is over."""

    barrier: Place
    parity: int

    def do(self, state: dict, part: int) -> bool:
        return state["barriers", self.barrier].phase != self.parity


class Arrive(NamedTuple):
    """Once, or ``count`` times."""

    barrier: Place
    count: int = 1

    def do(self, state: dict, part: int) -> None:
        state["barriers", self.barrier] = state["barriers", self.barrier].after(arrivals=self.count)


class Expect(NamedTuple):
    """Arrive, and have the phase last until so many loads have landed."""

    barrier: Place
    loads: int

    def do(self, state: dict, part: int) -> None:
        state["barriers", self.barrier] = state["barriers", self.barrier].after(arrivals=1, loads=self.loads)


class Load(NamedTuple):
    """Begin to bring the ``use``-th content of a place."""

    barrier: Place
    place: Place
    use: int

    def do(self, state: dict, part: int) -> None:
        for (what, _), products in state.items():
            if what == "products":
                assert all(self.place not in reads for reads in products), f"{self} over what is read"
        state["content", self.place] = None
        state["loads", self.barrier] += (self,)


class Read(NamedTuple):
    """By ordinary instructions, which end here."""

    place: Place
    use: int = 0

    def do(self, state: dict, part: int) -> None:
        found = state["content", self.place]
        assert found == self.use, f"{self} finds another content, {found}"


class Multiply(NamedTuple):
    """Begin a product, as a group of its own, that reads its operands until a ``WaitProducts`` covers it."""

    operands: tuple[Read, ...]

    def do(self, state: dict, part: int) -> None:
        for operand in self.operands:
            operand.do(state, part)
        state["products", part] += (tuple(operand.place for operand in self.operands),)


class WaitProducts(NamedTuple):
    """Until no more than so many of this group's products, the last ones, are in flight."""

    in_flight: int

    def do(self, state: dict, part: int) -> None:
        products = state["products", part]
        state["products", part] = products[max(len(products) - self.in_flight, 0) :]


Operation = Wait | Arrive | Expect | Load | Read | Multiply | WaitProducts


class Kernel(NamedTuple):
    """``counts`` of arrivals that mbarriers wait for, what happens before the parts begin, and the parts."""

    counts: dict[Place, int]
    before: list[Operation]
    parts: list[list[Operation]]


def explore(kernel: Kernel) -> None:
    """Raise an AssertionError if an order is wrong: see above."""
    programs = [_steps(part) for part in kernel.parts]
    state = _beginning(kernel)
    for operation in kernel.before:
        assert operation.do(state, 0) is not False, f"{operation} for ever"
    found, todo = {tuple(state.values())}, [state]
    while todo:
        state = todo.pop()
        following = list(_following(state, programs))
        waiting = [step for part, program in enumerate(programs) for step in program[state["at", part] :][:1]]
        assert following or not waiting, f"they wait for ever: {waiting}"
        in_flight = [values for (what, _), values in state.items() if what in ("products", "loads") and values]
        assert waiting or not in_flight, f"it ends with these in flight: {in_flight}"
        for after in following:
            if (values := tuple(after.values())) not in found:
                found.add(values)
                todo.append(after)


def _beginning(kernel: Kernel) -> dict:
    """All that changes, in an order that stays."""
    loads = [operation for part in (kernel.before, *kernel.parts) for operation in part if isinstance(operation, Load)]
    parts = range(len(kernel.parts))
    return (
        {("at", part): 0 for part in parts}
        | {("products", part): () for part in parts}
        | {("barriers", barrier): Mbarrier(count, count) for barrier, count in kernel.counts.items()}
        | {("loads", barrier): () for barrier in kernel.counts}
        | {("content", load.place): None for load in loads}
    )


def _steps(part: list[Operation]) -> list[list[Operation]]:
    """Operations that go without a stop: see above about products; other parts cannot tell a load from its Expect."""
    steps = []
    for operation in part:
        if steps and (isinstance(operation, Load | Multiply) or isinstance(steps[-1][-1], WaitProducts)):
            steps[-1].append(operation)
        else:
            steps.append([operation])
    return steps


def _following(state: dict, programs: list[list[list[Operation]]]) -> Iterator[dict]:
    """The states behind one more step, of any part or of the TMA unit."""
    for part, program in enumerate(programs):
        if (at := state["at", part]) < len(program):
            after = state | {("at", part): at + 1}
            if all(operation.do(after, part) is not False for operation in program[at]):
                yield after
    for (what, barrier), loads in state.items():
        if what == "loads" and loads:
            landed = {("content", load.place): load.use for load in loads}
            turned = state["barriers", barrier].after(loads=-len(loads))
            yield state | landed | {("loads", barrier): (), ("barriers", barrier): turned}
