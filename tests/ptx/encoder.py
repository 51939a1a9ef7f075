"""From a kernel's statements to instructions of the machine: registers, constants, memory; the tables of what there is.

Registers of a warp lie one after another in bytes, and so do constants, which are registers that nothing writes. What
an instruction becomes is said by the functions of ``instructions/``, by its first word: ``@encodes("ld")``.
"""

import re
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .syntax import (
    WIDTH,
    Entry,
    Module,
    PtxError,
    Scope,
    Statement,
    UnknownPtxError,
    Variable,
    number,
    shared_variable,
    split_operands,
)

WARP = 32
SHARED_BASE = 1024  # kSharedBase of machine.h
PLAIN, BRANCH, EXIT, BARRIER, COLLECTIVE, INDEXED_BRANCH = range(6)  # Kind of machine.h
SPECIALS = {  # as launch.cpp numbers them
    "%tid.x": 0, "%tid.y": 1, "%tid.z": 2, "%ntid.x": 3, "%ntid.y": 4, "%ntid.z": 5,
    "%ctaid.x": 6, "%ctaid.y": 7, "%ctaid.z": 8, "%nctaid.x": 9, "%nctaid.y": 10, "%nctaid.z": 11,
    "%laneid": 12, "%warpid": 13, "%lanemask_eq": 14, "%lanemask_lt": 15, "%lanemask_le": 16, "%lanemask_ge": 17,
    "%lanemask_gt": 18, "%clock": 19, "%dynamic_smem_size": 20,
}  # fmt: skip
SPACES = {"generic": 0, "global": 1, "shared": 2}  # Space of loads_stores.cpp

_ENCODERS = {}


def encodes(*names: str) -> Callable:
    """Register a function ``(encoder, parts, operands)``: the dotted parts of an instruction's name, its operands."""

    def register(function: Callable) -> Callable:
        _ENCODERS.update(dict.fromkeys(names, function))
        return function

    return register


class Label(NamedTuple):
    name: str
    scope: Scope


class Encoded(NamedTuple):
    """An instruction of the machine: Instruction of machine.h."""

    name: str
    kind: int
    predicate: tuple[int, bool]
    target: Label | int
    negated: int
    unit: str
    operands: list[int | Label]
    destinations: int
    immediates: list[int]


class Register:
    """A declared register; it has a place once it is used."""

    def __init__(self, type_name: str) -> None:
        self.type = type_name
        self.width = WIDTH[type_name]
        self.place: int | None = None


class Encoder:
    """Encodes one kernel.

    Attributes:
        instructions: all of them, targets of branches still as labels.
        origin: the statement that each came from.
        labels: which instruction they stand in front of.
        register_bytes: of a warp.
        static_shared: bytes of shared memory that the text declares.
        specials: places of the special registers that are read.
    """

    def __init__(self, module: Module, entry: Entry) -> None:
        self.instructions: list[Encoded] = []
        self.origin: list[Statement] = []
        self.labels: dict[tuple[Scope, str], int] = {}
        self.tables: dict[tuple[Scope, str], list[str]] = {}
        self.register_bytes = self.static_shared = 0
        self.specials: dict[str, int] = {}
        self.parameter_at = {parameter.name: parameter.offset for parameter in entry.parameters}
        self.symbols = dict(self.parameter_at)  # a parameter's address is its offset
        self._registers: dict[tuple[Scope, str], Register] = {}
        self._constants: dict[tuple[int, int], int] = {}
        self._next_used_bytes = 0
        for variable in module.shared:
            self._place(variable)
        statements = [statement for statement in entry.statements if not self._declare(statement)]
        for variable in module.dynamic_shared:  # behind all others
            self._place(variable)
        for statement in statements:
            self._encode(statement)

    # Declarations.

    def _place(self, variable: Variable) -> None:
        self.static_shared = -(-self.static_shared // variable.align) * variable.align
        self.symbols[variable.name] = SHARED_BASE + self.static_shared
        self.static_shared += variable.size

    def _declare(self, statement: Statement) -> bool:
        text, scope = statement.text, statement.scope
        if text.startswith(".reg"):
            type_name, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
            for name in names.split(","):
                many = re.fullmatch(r"([%\w$]+)<(\d+)>", name.strip())
                for each in [f"{many[1]}{k}" for k in range(int(many[2]))] if many else [name.strip()]:
                    self._registers[scope, each] = Register(type_name)
        elif text.startswith(".shared"):
            self._place(shared_variable(text))
        elif text.startswith(".local"):
            raise UnknownPtxError(f"local memory: {text}")
        elif text.startswith(".branchtargets") or text.endswith(":") or "used_bytes_mask" in text:
            return False  # they have a place among the instructions
        return text.startswith(".")

    def _encode(self, statement: Statement) -> None:
        text, scope = statement.text, statement.scope
        self.statement, self._scope, self._negated, self._predicate = statement, scope, 0, (-1, False)
        if text.endswith(":"):
            self.labels[scope, text[:-1]] = len(self.instructions)
            self._last_label = text[:-1]
            return
        if text.startswith(".branchtargets"):
            self.tables[scope, self._last_label] = [name.strip() for name in text.partition(" ")[2].split(",")]
            return
        if text.startswith(".pragma"):  # of the next load: which of its bytes are used
            self._next_used_bytes = int(re.search(r"used_bytes_mask (\w+)", text)[1], 0)
            return
        self.used_bytes, self._next_used_bytes = self._next_used_bytes, 0
        guard = re.match(r"@(!?)\s*(%?[\w$]+)\s+(.*)$", text, re.S)
        if guard:
            self._predicate = self.source(guard[2], "pred"), bool(guard[1])
            text = guard[3]
        name, operands = re.match(r"([a-z][\w.:]*)\s*(.*)$", text, re.S).groups()
        parts = name.split(".")
        if parts[0] not in _ENCODERS:
            raise self.unknown(f"instruction {name}")
        _ENCODERS[parts[0]](self, parts, split_operands(operands))

    # For encoders: what goes into an instruction.

    def emit(self, name, operands, destinations, *immediates, unit="OTHER", kind=PLAIN, target=-1) -> None:
        """Add an instruction; its first ``destinations`` operands are written."""
        immediates = [int(value) for value in immediates]
        self.instructions.append(
            Encoded(name, kind, self._predicate, target, self._negated, unit, list(operands), int(destinations),
                    immediates + [0] * (8 - len(immediates)))
        )  # fmt: skip
        self.origin.append(self.statement)

    def unknown(self, what: str = "") -> UnknownPtxError:
        """For raising: this statement is none that the emulator knows."""
        return UnknownPtxError(f"{what or 'unknown'}: {self.statement.text!r} (PTX line {self.statement.line})")

    def allocate(self, width: int) -> int:
        """The place of a register that has no name."""
        place = self.register_bytes
        self.register_bytes += max(width, 4) * WARP
        return place

    def label(self, name: str) -> Label:
        """For operands and targets, as seen from here."""
        return Label(name.strip(), self._scope)

    def find(self, table: dict, name: str):
        """What ``name`` means in the innermost scope that knows it, or None."""
        for depth in range(len(self._scope), -1, -1):
            if (self._scope[:depth], name) in table:
                return table[self._scope[:depth], name]
        return None

    def register(self, name: str) -> Register | None:
        found = self.find(self._registers, name.strip())
        if found is not None and found.place is None:
            found.place = self.allocate(found.width)
        return found

    def register_width(self, name: str, default: int) -> int:
        found = self.register(name)
        return found.width if found else default

    def constant(self, width: int, value: int) -> int:
        """The place of a register that holds ``value``."""
        key = width, value & (1 << 8 * width) - 1
        if key not in self._constants:
            self._constants[key] = self.allocate(width)
        return self._constants[key]

    def source(self, text: str, type_name: str, any_width: bool = False) -> int:
        """The place of an operand that is read: a register, special register or immediate."""
        text = text.strip()
        if text in SPECIALS:
            if WIDTH[type_name] != 4:
                raise self.unknown(f"special register as {type_name}")
            if text not in self.specials:
                self.specials[text] = self.allocate(4)
            return self.specials[text]
        found = self.register(text)
        if found is not None:
            if (found.type == "pred") != (type_name == "pred") or (found.width != WIDTH[type_name] and not any_width):
                raise PtxError(f"{text} is {found.type}, not {type_name}: {self.statement.text!r}")
            return found.place
        if type_name == "pred":
            value = number(text)
            if value is None:
                raise self.unknown(f"predicate {text!r}")
            return self.constant(4, 0xFFFFFFFF if value else 0)
        return self.constant(WIDTH[type_name], self.immediate_bits(text, type_name))

    def predicate(self, text: str, position: int) -> int:
        """A predicate operand, perhaps negated: ``position`` among the operands."""
        if text.strip().startswith("!"):
            self._negated |= 1 << position
            text = text.strip()[1:]
        return self.source(text, "pred")

    def destination(self, text: str, type_name: str, any_width: bool = False) -> int:
        """The place of a register that is written; -1 where ``_`` throws the result away."""
        if text.strip() == "_":
            return -1
        found = self.register(text)
        if found is None:
            raise self.unknown(f"destination {text!r}")
        if found.width != WIDTH[type_name] and not any_width:
            raise PtxError(f"{text} is {found.type}, not {type_name}: {self.statement.text!r}")
        return found.place

    def immediate_bits(self, text: str, type_name: str) -> int:
        """The bits of a constant: a number, 0f and 0d hexadecimals, the address of a variable."""
        text, wide = text.strip(), WIDTH[type_name] == 8
        if text[:2] in ("0f", "0F"):
            bits = int(text[2:], 16)
            return _bits(struct.unpack("<f", struct.pack("<I", bits))[0], True) if wide else bits
        if text[:2] in ("0d", "0D"):
            bits = int(text[2:], 16)
            return bits if wide else _bits(struct.unpack("<d", struct.pack("<Q", bits))[0], False)
        value = number(text)
        if value is not None:
            return value
        match = re.fullmatch(r"([\w$]+)(?:\s*\+\s*(\d+))?", text)
        if match and match[1] in self.symbols:
            return self.symbols[match[1]] + int(match[2] or 0)
        if re.fullmatch(r"-?\d+\.\d*(e[+-]?\d+)?", text, re.I):
            return _bits(float(text), wide)
        raise self.unknown(f"operand {text!r}")

    def address(self, text: str) -> tuple[int, int, int]:
        """``[register + offset]``: the place that holds the address, the offset, bytes of the address."""
        match = re.fullmatch(r"\[\s*(%?[\w$]+)(?:\s*\+\s*(-?\w+))?\s*\]", text.strip())
        if not match:
            raise self.unknown(f"address {text!r}")
        base, offset = match[1], number(match[2]) if match[2] else 0
        if base in self.symbols:
            return self.constant(4, self.symbols[base]), offset, 4
        if number(base) is not None:
            return self.constant(8, number(base)), offset, 8
        found = self.register(base)
        if found is None:
            raise self.unknown(f"address {text!r}")
        return found.place, offset, found.width

    @staticmethod
    def group(text: str) -> list[str]:
        """The operands in braces, or the one without."""
        text = text.strip()
        return [part.strip() for part in text[1:-1].split(",")] if text.startswith("{") else [text]

    # What the machine starts from.

    def resolved(self, label: Label) -> int:
        """The instruction a label stands in front of."""
        self._scope = label.scope
        found = self.find(self.labels, label.name)
        if found is None:
            raise PtxError(f"no label {label.name}")
        return found

    def register_image(self) -> np.ndarray:
        """Bytes of the registers of a warp at its start: constants, false predicates, and NaN everywhere else."""
        image = np.full(self.register_bytes + 256, 0xFF, np.uint8)
        for register in self._registers.values():
            if register.type == "pred" and register.place is not None:
                image[register.place : register.place + 4] = 0
        for (width, value), place in self._constants.items():
            image[place : place + WARP * width] = np.frombuffer(value.to_bytes(width, "little") * WARP, np.uint8)
        return image


def _bits(value: float, wide: bool) -> int:
    integer, real = ("<Q", "<d") if wide else ("<I", "<f")
    return struct.unpack(integer, struct.pack(real, value))[0]
