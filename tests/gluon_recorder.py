"""What the parts of a kernel in Gluon do to mbarriers, to what TMA loads, and to products: from the kernel's own code.

``protocol_of`` runs the kernel as Python, with numbers for what decides how often its loops run, and something unknown
for everything else. A branch on the unknown is an error, so what comes is what every such launch does.
"""

import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from types import FunctionType, SimpleNamespace

from mbarriers import Arrive, Expect, Kernel, Load, Multiply, Operation, Place, Read, Wait, WaitProducts


class Unknown:
    """What any operation on something unknown gives."""

    nbytes_per_cta = 1  # of a tensor map: so that mbarriers expect a number of loads

    def __bool__(self) -> bool:
        raise TypeError("a branch on something unknown")

    def __len__(self) -> int:  # of a shape: what is unknown may have any
        return 0

    def __getattr__(self, name: str) -> "Unknown":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def _another(self, *arguments: object, **options: object) -> "Unknown":
        return UNKNOWN

    __call__ = __getitem__ = __neg__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _another
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _another
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = _another


UNKNOWN = Unknown()


class Shared(Unknown):
    """An allocation of shared memory, or a part of one; views and pieces of a part are the part."""

    def __init__(self, recorder: "Recorder", place: Place, shape: list[int] | Unknown) -> None:
        self.recorder, self.place, self.shape = recorder, place, shape

    def index(self, i: int) -> "Shared":
        number, part = self.place
        return self if part is not None else Shared(self.recorder, (number, i), self.shape[1:])

    def slice(self, *_: int) -> "Shared":
        return self

    permute = reshape = reinterpret = _reinterpret = slice

    def load(self, *_: object) -> Unknown:
        self.recorder.operations.append(Read(self.place))
        return UNKNOWN


class Recorder:
    """Stands for the modules of Gluon."""

    def __init__(self, stubs: dict[str, object]) -> None:
        self.counts: dict[Place, int] = {}
        self.before: list[Operation] = []
        self.operations = self.before
        self.parts: list[list[Operation]] = []
        self.allocated = 0
        self.fills: dict[int, list[int]] = {}  # of an allocation: which Expect its loads belonged to
        self.globals: dict[str, dict] = {}
        self.stubs = stubs | {
            "gl": self.language(),
            "tl": self.language(),
            "mbarrier": SimpleNamespace(
                allocate_mbarrier=lambda batch=None: self.allocate(None, [batch or 1]),
                init=lambda barrier, count: self.counts.update({barrier.place: count}),
                wait=self.wait,
                arrive=lambda barrier, count: self.operations.append(Arrive(barrier.place, count)),
                expect=lambda barrier, loads: self.operations.append(Expect(barrier.place, loads)),
            ),
            "tma": SimpleNamespace(async_load=self.load),
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.wait_products,
            "fence_async_shared": UNKNOWN,
            "async_copy": UNKNOWN,
        }

    def language(self) -> Unknown:
        language = Unknown()
        language.static_range = range
        language.where = lambda which, yes, no: UNKNOWN if isinstance(which, Unknown) else yes if which else no
        language.maximum = lambda a, b: UNKNOWN if isinstance(a, Unknown) or isinstance(b, Unknown) else max(a, b)
        language.allocate_shared_memory = self.allocate
        language.warp_specialize = self.specialize
        return language

    def allocate(self, _: object, shape: list[int] | Unknown, *__: object) -> Shared:
        self.allocated += 1
        return Shared(self, (self.allocated - 1, None), shape)

    def specialize(self, parts: Iterable[tuple], *_: object) -> None:
        for function, arguments in parts:
            self.operations = []
            self.parts.append(self.operations)
            function(*arguments)

    def wait(self, barrier: Shared, parity: int, pred: bool = True) -> None:
        if pred:
            self.operations.append(Wait(barrier.place, parity))

    def load(self, _: object, __: object, barrier: Shared, place: Shared) -> None:
        expect = max(i for i, operation in enumerate(self.operations) if isinstance(operation, Expect))
        fills = self.fills.setdefault(place.place[0], [])
        if fills[-1:] != [expect]:
            fills.append(expect)
        self.operations.append(Load(barrier.place, place.place, len(fills) - 1))

    def multiply(self, left: Unknown, right: Unknown, *_: object, is_async: bool = False, **__: object) -> Unknown:
        operands = tuple(Read(x.place) for x in (left, right) if isinstance(x, Shared))
        self.operations += [Multiply(operands)] if is_async else [Multiply(operands), WaitProducts(0)]
        return UNKNOWN

    def wait_products(self, in_flight: int, deps: list) -> Unknown | list:
        self.operations.append(WaitProducts(in_flight))
        return deps[0] if len(deps) == 1 else deps

    def running(self, function: object) -> FunctionType:
        """The Python function of a compiled one, which calls what is recorded."""
        fn = function.fn
        return FunctionType(fn.__code__, self.globals_of(fn.__module__), fn.__name__, fn.__defaults__, fn.__closure__)

    def globals_of(self, module: str) -> dict[str, object]:
        if module not in self.globals:
            here = self.globals[module] = {}
            for name, value in vars(sys.modules[module]).items():
                if name in self.stubs:
                    here[name] = self.stubs[name]
                elif hasattr(value, "fn"):
                    here[name] = self.running(value)
                else:
                    here[name] = getattr(value, "value", value)  # of a gl.constexpr
        return self.globals[module]


def protocol_of(kernel: object, reads: list[Place], stubs: dict[str, object], **known: object) -> Kernel:
    """The parts of a kernel.

    Args:
        reads: which loads each consumer reads, in order: (number of the allocation, number of the load to it).
        stubs: by their names, what takes the place of functions and constants of the kernel's modules.
        known: arguments, of which it may have some; its others are unknown.
    """
    recorder = Recorder(stubs)
    names = kernel.fn.__code__.co_varnames[: kernel.fn.__code__.co_argcount]
    recorder.running(kernel)(**{name: known.get(name, UNKNOWN) for name in names})
    everything = chain(recorder.before, *recorder.parts)
    loaded = {operation.place for operation in everything if isinstance(operation, Load)}
    return Kernel(recorder.counts, recorder.before, [list(_expecting(part, loaded, reads)) for part in recorder.parts])


def _expecting(part: list[Operation], loaded: set[Place], reads: list[Place]) -> Iterator[Operation]:
    """The operations of a part, with the contents it should find, and without reads of what TMA does not load."""
    rest = iter(reads)

    def expecting(read: Read) -> Read:
        number, use = next(rest, (None, 0))
        assert number == read.place[0], f"{read} where it should read from {number}"
        return read._replace(use=use)

    for operation in part:
        if isinstance(operation, Multiply):
            yield Multiply(tuple(expecting(read) for read in operation.operands if read.place in loaded))
        elif not isinstance(operation, Read):
            yield operation
        elif operation.place in loaded:
            yield expecting(operation)
    if any(isinstance(operation, Multiply) for operation in part):
        assert not (left := list(rest)), f"it does not read {left}"
