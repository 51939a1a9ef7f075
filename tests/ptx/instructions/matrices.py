"""ldmatrix, stmatrix, mma.sync and wgmma."""

import re

from ..encoder import Encoder, encodes
from ..syntax import number

_TYPES = {"f16": 0, "bf16": 1, "tf32": 2}  # MatrixType of numbers.h
_MMA = re.compile(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(f16|bf16|tf32)\.\2\.f32")
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(f16|bf16)\.\3")


@encodes("ldmatrix", "stmatrix")
def _matrices(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    count = next((int(part[1]) for part in parts if re.fullmatch(r"x[124]", part)), None)
    address, registers = operands if parts[0] == "stmatrix" else operands[::-1]
    registers = encoder.group(registers)
    if "m8n8" not in parts or parts[-1] != "b16" or len(registers) != count:
        raise encoder.unknown()
    place, offset, width = encoder.address(address)
    immediates = offset, width, 0, count, "trans" in parts
    if parts[0] == "stmatrix":
        encoder.emit("stmatrix", [place, *(encoder.source(text, "b32") for text in registers)], 0, *immediates)
    else:
        encoder.emit("ldmatrix", [*(encoder.destination(n, "b32") for n in registers), place], count, *immediates)


@encodes("mma")
def _mma(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    match = _MMA.fullmatch(".".join(parts))
    if not match:
        raise encoder.unknown()
    depth, type_name = int(match[1]), match[2]
    d, a, b, c = map(encoder.group, operands)
    per_register = 1 if type_name == "tf32" else 2  # elements
    if (len(d), len(a), len(b), len(c)) != (4, depth // 2 // per_register, depth // 4 // per_register, 4):
        raise encoder.unknown()
    sources = [encoder.source(text, "b32") for text in a + b] + [encoder.source(text, "f32") for text in c]
    encoder.emit("mma", [*(encoder.destination(name, "f32") for name in d), *sources], 4, depth, _TYPES[type_name])


@encodes("wgmma")
def _wgmma(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    if parts[1] in ("fence", "commit_group"):
        encoder.emit(f"wgmma.{parts[1]}", [], 0)
        return
    if parts[1] == "wait_group":
        encoder.emit("wgmma.wait_group", [], 0, number(operands[0]))
        return
    match = _WGMMA.fullmatch(".".join(parts))
    d = encoder.group(operands[0])
    if not match or match[2] != "16" or len(d) != int(match[1]) // 2:
        raise encoder.unknown()
    a_in_registers = operands[1].startswith("{")
    places = [encoder.destination(name, "f32") for name in d]
    places += [encoder.source(text, "b32" if a_in_registers else "b64") for text in encoder.group(operands[1])]
    places.append(encoder.source(operands[2], "b64"))
    scale = number(operands[3])  # a constant, or a predicate
    if scale is None:
        places.append(encoder.predicate(operands[3], len(places)))
    negated = sum(1 << k for k in range(2) if number(operands[4 + k]) == -1)
    transposed = [number(text) for text in operands[6:]]
    transpose_a, transpose_b = transposed if len(transposed) == 2 else (0, *transposed, 0)[:2]
    encoder.emit(
        "wgmma", places, len(d),
        match[1], _TYPES[match[3]], a_in_registers, scale is None, scale or 0, transpose_a, transpose_b, negated,
    )  # fmt: skip
