"""Loads, stores and atomic operations."""

import re

from ..encoder import SPACES, Encoder, encodes
from ..syntax import SIZE, WIDTH

_LOAD = ("global", "shared", "param", "nc", "volatile", "relaxed", "acquire", "cta", "gpu", "sys", "weak")
_LOAD += ("v2", "v4", "v8", "ca", "cg", "cs", "lu", "cv")
_STORE = ("global", "shared", "volatile", "relaxed", "release", "cta", "gpu", "sys", "weak")
_STORE += ("v2", "v4", "v8", "wb", "cg", "cs", "wt")
_ATOMIC = ("global", "shared", "relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys")
_OPERATIONS = {"add": 0, "max": 1, "min": 2, "and": 5, "or": 6, "xor": 7, "exch": 8, "cas": 9}  # of loads_stores.cpp
_ADD_FLOAT = 10


def _space(encoder: Encoder, parts: list[str], allowed: tuple[str, ...]) -> str:
    """The state space; hints on caches change nothing."""
    for part in parts[1:-1]:
        if part not in allowed and not part.startswith(("L1::", "L2::", "shared::cta")):
            raise encoder.unknown(f"modifier {part}")
    return next((part.split("::")[0] for part in parts if part.split("::")[0] in (*SPACES, "param")), "generic")


@encodes("ld")
def _ld(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    type_name, space = parts[-1], _space(encoder, parts, _LOAD)
    names = encoder.group(operands[0])
    width = next((encoder.register_width(name, 0) for name in names if name != "_"), WIDTH[type_name])
    places = [encoder.destination(name, type_name, any_width=True) for name in names]
    data = len(names), SIZE[type_name], width, type_name[0] == "s"
    if space == "param":
        named = re.fullmatch(r"\[\s*([\w$]+)(?:\s*\+\s*(\d+))?\s*\]", operands[1])
        if named and named[1] in encoder.parameter_at:
            offset = encoder.parameter_at[named[1]] + int(named[2] or 0)
            encoder.emit("ld.param", places, len(names), offset, 0, 0, *data)
        else:
            place, offset, address_width = encoder.address(operands[1])
            encoder.emit("ld.param.indirect", [*places, place], len(names), offset, address_width, 0, *data)
        return
    place, offset, address_width = encoder.address(operands[1])
    encoder.emit(
        "ld", [*places, place], len(names), offset, address_width, SPACES[space], *data, encoder.used_bytes
    )  # fmt: skip


@encodes("st")
def _st(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    type_name, space = parts[-1], _space(encoder, parts, _STORE)
    texts = encoder.group(operands[1])
    width = next((encoder.register_width(text, 0) for text in texts if encoder.register(text)), WIDTH[type_name])
    values = [
        encoder.source(text, type_name, any_width=True)
        if encoder.register(text)
        else encoder.constant(width, encoder.immediate_bits(text, type_name))
        for text in texts
    ]
    place, offset, address_width = encoder.address(operands[0])
    encoder.emit(
        "st", [place, *values], 0, offset, address_width, SPACES[space], len(texts), SIZE[type_name], width
    )  # fmt: skip


@encodes("atom", "red")
def _atomic(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    type_name, has_destination = parts[-1], parts[0] == "atom"
    name = next((part for part in parts if part in _OPERATIONS), None)
    space = _space(encoder, [part for part in parts if part != name], _ATOMIC)
    is_float = type_name[0] == "f" or "bf16" in type_name
    if name is None or (is_float and (name, type_name) != ("add", "f32")):
        raise encoder.unknown()
    operation = _ADD_FLOAT if is_float else _OPERATIONS[name] + 2 * (type_name[0] == "s" and name in ("max", "min"))
    destinations = []
    if has_destination:
        into, *operands = operands
        destinations = [encoder.allocate(8) if into == "_" else encoder.destination(into, type_name)]
    place, offset, address_width = encoder.address(operands[0])
    sources = [encoder.source(text, type_name) for text in operands[1:]]
    encoder.emit(
        "atom", [*destinations, place, *sources], len(destinations),
        offset, address_width, SPACES[space], 1, SIZE[type_name], has_destination, operation,
    )  # fmt: skip


@encodes("membar", "prefetch")
def _nothing(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    """Blocks run one after another, and caches are not modelled."""
    encoder.emit("nop", [], 0)
