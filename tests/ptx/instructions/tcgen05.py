"""tcgen05: tensor memory and the matrix unit of Blackwell's GPUs."""

import re

from ..encoder import Encoder, encodes
from ..syntax import number

_MMA = re.compile(r"mma\.cta_group::1\.kind::(f16|tf32)")
_COMMIT = re.compile(r"commit\.cta_group::1\.mbarrier::arrive::one(\.shared::cluster)?\.b64")
_MOVE = re.compile(r"(ld|st)\.sync\.aligned\.(\w+)\.x(1|2|4|8|16|32|64|128)\.b32")
# Shapes as tensor_memory.cpp numbers them, and registers of a thread for x1.
_SHAPES = {"32x32b": (0, 1), "16x64b": (1, 1), "16x128b": (2, 2), "16x256b": (3, 4), "16x32bx2": (4, 1)}
_ALLOC = re.compile(r"alloc\.cta_group::1\.sync\.aligned(\.shared::cta)?\.b32")
_PLAIN = {
    "relinquish_alloc_permit.cta_group::1.sync.aligned": "relinquish_alloc_permit",
    "wait::ld.sync.aligned": "wait::ld",
    "wait::st.sync.aligned": "wait::st",
}
_FENCES = {"fence::before_thread_sync": 0, "fence::after_thread_sync": 1}


@encodes("tcgen05")
def _tcgen05(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    name = ".".join(parts[1:])
    if name in _PLAIN:
        encoder.emit(f"tcgen05.{_PLAIN[name]}", [], 0)
    elif name in _FENCES:
        encoder.emit("tcgen05.fence", [], 0, _FENCES[name])
    elif name == "dealloc.cta_group::1.sync.aligned.b32" and number(operands[1]) is not None:
        encoder.emit("tcgen05.dealloc", [encoder.source(operands[0], "b32")], 0, number(operands[1]))
    elif _ALLOC.fullmatch(name) and number(operands[1]) is not None:
        place, offset, width = encoder.address(operands[0])
        encoder.emit("tcgen05.alloc", [place], 0, offset, width, number(operands[1]))
    elif _COMMIT.fullmatch(name) and len(operands) == 1:
        place, offset, width = encoder.address(operands[0])
        encoder.emit("tcgen05.commit", [place], 0, offset, width)
    elif match := _MOVE.fullmatch(name):
        _move(encoder, *match.groups(), operands)
    elif (match := _MMA.fullmatch(name)) and len(operands) == 5:
        _mma(encoder, match[1], operands)
    else:
        raise encoder.unknown()


def _move(encoder: Encoder, what: str, shape: str, count: str, operands: list[str]) -> None:
    """``ld registers, [address] (, split)`` or ``st [address], (split,) registers``."""
    number_of_shape, registers_each = _SHAPES.get(shape, (None, 0))
    halves = shape == "16x32bx2"
    if number_of_shape is None or len(operands) != 2 + halves:
        raise encoder.unknown()
    registers, address = (operands[0], operands[1]) if what == "ld" else (operands[-1], operands[0])
    split = number(operands[2 if what == "ld" else 1]) if halves else 0
    names = encoder.group(registers)
    place, offset, width = encoder.address(address)
    if len(names) != registers_each * int(count) or width != 4 or split is None or split < 0:
        raise encoder.unknown()
    immediates = offset, len(names), number_of_shape, split
    if what == "ld":
        loaded = [encoder.destination(name, "b32") for name in names]
        encoder.emit("tcgen05.ld", [*loaded, place], len(names), *immediates)
    else:
        encoder.emit("tcgen05.st", [place, *(encoder.source(text, "b32") for text in names)], 0, *immediates)


def _mma(encoder: Encoder, kind: str, operands: list[str]) -> None:
    to, a, b, shape, adds = operands
    to, offset, width = encoder.address(to)
    a_in_tensor_memory, a_offset, a_width = a.startswith("["), 0, 4
    if a_in_tensor_memory:
        a, a_offset, a_width = encoder.address(a)
    else:
        a = encoder.source(a, "b64")
    if (width, a_width) != (4, 4):
        raise encoder.unknown()
    places = [to, a, encoder.source(b, "b64"), encoder.source(shape, "b32"), encoder.predicate(adds, 4)]
    encoder.emit("tcgen05.mma", places, 0, offset, a_in_tensor_memory, a_offset, kind == "tf32")
