"""The launches of a process: which kernel, on what grid, and what it came to."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .kernel import Buffer, EmulationError, Kernel, Launch


class Emulated(NamedTuple):
    """One launch.

    Attributes:
        name: of the kernel.
        architecture: the target of its PTX: sm_80, sm_90a, ...
        block: threads.
        shared: bytes of shared memory of a block.
        seconds: that the emulator took.
    """

    name: str
    architecture: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    kernel: Kernel
    result: Launch
    seconds: float

    def faults(self) -> list[str]:
        return [f"{self.name} on {self.architecture}, emulated: {fault}" for fault in self.result.faults()]


@dataclass
class Schedule:
    """In which order warps run (``machine/launch.cpp``), and whether races in global memory are looked for."""

    order: int = 0
    check_global: bool = True


schedule = Schedule()
_listeners: list[list[Emulated]] = []


@contextlib.contextmanager
def recorded() -> Iterator[list[Emulated]]:
    """The launches of the block, as they happen."""
    launches: list[Emulated] = []
    _listeners.append(launches)
    try:
        yield launches
    finally:
        _listeners.remove(launches)


def reached(tensors: Iterable[torch.Tensor]) -> list[Buffer]:
    """The memory of tensors; views of one storage together."""
    buffers: dict[int, Buffer] = {}
    for tensor in tensors:
        storage, start, bytes_each = tensor.untyped_storage(), tensor.data_ptr(), tensor.element_size()
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        end = start + bytes_each * (1 + sum((n - 1) * stride for n, stride in steps)) if tensor.numel() else start
        low, high = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        other = buffers.get(low, Buffer(low, high, start, end))
        buffers[low] = Buffer(low, high, min(start, other.view_low), max(end, other.view_high))
    return list(buffers.values())


def launch(
    name: str,
    kernel: Kernel,
    grid: tuple[int, int, int],
    threads: int,
    dynamic_shared: int,
    parameters: bytes,
    buffers: list[Buffer],
) -> Emulated:
    """Run a kernel and tell whoever records.

    Raises:
        EmulationError: it could not be run to its end; what else is wrong is in the record.
    """
    began = time.perf_counter()
    result = kernel.launch(
        grid, (threads, 1, 1), dynamic_shared, parameters, buffers,
        order=schedule.order, check_global=schedule.check_global,
    )  # fmt: skip
    emulated = Emulated(
        name, kernel.module.target, grid, (threads, 1, 1), kernel.static_shared + dynamic_shared, kernel, result,
        time.perf_counter() - began,
    )  # fmt: skip
    for launches in _listeners:
        launches.append(emulated)
    if result.failure:
        raise EmulationError("\n".join(emulated.faults()))
    return emulated
