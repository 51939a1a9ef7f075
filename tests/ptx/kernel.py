"""Kernels of PTX that run on the CPU: ``Module(text)``, ``Kernel(module, name)``, ``kernel.launch(...)``."""

import ctypes
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from . import instructions  # noqa: F401  (fills the encoder's table)
from .encoder import SPECIALS, Encoder, Label
from .library import count_names, library
from .syntax import Entry, Module, UnknownPtxError

LIMIT = 1 << 30  # instructions of warps: minutes, ten times what any test needs


class EmulationError(RuntimeError):
    """A kernel did what it must not do, or what is wrong in it."""


class Finding(NamedTuple):
    """What the machine saw, at one instruction."""

    kind: str
    serious: bool
    """Wrong, and not only odd."""
    count: int
    first: str
    """Block, warp, lane and address of the first time."""
    where: str
    """Line of the source and of the PTX."""

    def __str__(self) -> str:
        return f"{self.kind}, {self.count} times, first {self.first}| {self.where}"


class Buffer(NamedTuple):
    """Memory that a kernel may touch, in bytes: a storage, and the part of it that tensors show."""

    low: int
    high: int
    view_low: int
    view_high: int


class Launch(NamedTuple):
    """What a launch came to.

    Attributes:
        counts: by the names of Count in machine.h.
        failure: what ended it early, or an empty text.
    """

    counts: dict[str, int]
    findings: list[Finding]
    failure: str

    def faults(self) -> list[str]:
        """All that is wrong, in words."""
        return ([self.failure] if self.failure else []) + [str(found) for found in self.findings if found.serious]


class Kernel:
    """A kernel of a PTX module, ready to run.

    Raises:
        UnknownPtxError: for instructions that the emulator does not know; it names them.
    """

    def __init__(self, module: Module, name: str) -> None:
        entry = Entry(module, name)
        encoder = Encoder(module, entry)
        self.module, self.name = module, name
        self.parameters, self.parameter_bytes = entry.parameters, entry.parameter_bytes
        self.static_shared = encoder.static_shared
        self.origin = encoder.origin
        self._entry = entry
        image = encoder.register_image()
        machine = library()
        self._machine = machine.ptx_new(image.ctypes.data, len(image))
        for special, place in encoder.specials.items():
            machine.ptx_add_special(self._machine, SPECIALS[special], place)
        units = {unit: number for number, unit in enumerate(count_names())}
        unknown = {}

        def place(operand):
            return encoder.resolved(operand) if isinstance(operand, Label) else operand

        for each, statement in zip(encoder.instructions, encoder.origin, strict=True):
            operands = np.array([place(operand) for operand in each.operands], np.int32)
            immediates = np.array(each.immediates, np.int64)
            if not machine.ptx_add_instruction(
                self._machine, each.name.encode(), each.kind, *each.predicate, place(each.target), each.negated,
                units[each.unit], len(operands), each.destinations, operands.ctypes.data, immediates.ctypes.data,
            ):  # fmt: skip
                unknown.setdefault(each.name, statement)
        if unknown:
            first = [f"{statement.text!r} (PTX line {statement.line})" for statement in unknown.values()]
            raise UnknownPtxError(f"instructions without a meaning in {name}: {', '.join(first)}")

    def __del__(self) -> None:
        if hasattr(self, "_machine"):
            library().ptx_free(self._machine)

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        dynamic_shared: int,
        parameters: bytes,
        buffers: Sequence[Buffer],
        *,
        order: int = 0,
        check_global: bool = True,
        ctas: Sequence[int] | None = None,
        limit: int = LIMIT,
    ) -> Launch:
        """Run the kernel.

        Args:
            grid, block: blocks and threads, three numbers each.
            dynamic_shared: bytes of shared memory besides those that the text declares.
            parameters: their bytes.
            buffers: global memory that it may touch.
            order: in which warps run; see launch.cpp.
            check_global: look for races in global memory.
            ctas: numbers of the blocks to run; by default all.
            limit: instructions of warps after which it is taken to go on for ever.
        """
        if len(parameters) != self.parameter_bytes:
            raise ValueError(f"{self.name}: {self.parameter_bytes} bytes of parameters, got {len(parameters)}")
        if self._entry.required_block not in (None, tuple(block)):
            raise ValueError(f"{self.name}: blocks of {self._entry.required_block} threads, got {tuple(block)}")
        machine = library()
        sizes = np.array([*grid, *block], np.uint32)
        ranges = np.array(buffers or [(0, 0, 0, 0)], np.uint64)
        chosen = None if ctas is None else np.array(ctas, np.uint32)
        machine.ptx_launch(
            self._machine, sizes.ctypes.data, sizes[3:].ctypes.data, self._entry.register_limit,
            self.static_shared + dynamic_shared, bytes(parameters), len(parameters), ranges.ctypes.data, len(buffers),
            order, check_global, limit, None if chosen is None else chosen.ctypes.data, len(ctas or ()),
        )  # fmt: skip
        counts = machine.ptx_counts(self._machine)
        failure = machine.ptx_failure(self._machine).decode()
        failure = re.sub(r"@(\d+)", lambda match: "| " + self.where(int(match[1])), failure)
        return Launch(dict(zip(count_names(), counts[: len(count_names())], strict=True)), self._findings(), failure)

    def _findings(self) -> list[Finding]:
        machine = library()
        kind, first = ctypes.c_char_p(), ctypes.c_char_p()
        pc, count, serious = ctypes.c_int32(), ctypes.c_uint64(), ctypes.c_int32()
        findings = []
        for which in range(machine.ptx_finding_count(self._machine)):
            fields = [ctypes.byref(field) for field in (kind, first, pc, count, serious)]
            machine.ptx_finding(self._machine, which, *fields)
            findings.append(
                Finding(
                    kind.value.decode(), bool(serious.value), count.value, first.value.decode(), self.where(pc.value)
                )
            )
        return findings

    def instruction_counts(self, which: int) -> np.ndarray:
        """Of the last launch, by instruction: 0 executions, 1 wavefronts of shared memory, 2 the least possible."""
        counts = library().ptx_instruction_counts(self._machine, which)
        return np.ctypeslib.as_array(counts, (len(self.origin),)).astype(np.int64)

    def source_line(self, instruction: int) -> str:
        """File and line that it was compiled from."""
        location = self.origin[instruction].location
        if location is None:
            return "?"
        names = [os.path.basename(self.module.files.get(file, str(file))) for file in location[::3]]
        line = f"{names[0]}:{location[1]}"
        return f"{line} (inlined at {names[1]}:{location[4]})" if len(location) > 3 else line

    def where(self, instruction: int) -> str:
        """Source line, line of the PTX, and what stands there."""
        if not 0 <= instruction < len(self.origin):
            return "?"
        statement = self.origin[instruction]
        text = " ".join(statement.text.split())[:110]
        return f"{self.source_line(instruction)} ptx line {statement.line}: {text}"
