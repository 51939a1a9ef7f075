"""Arithmetic, logic, comparisons, moves and conversions: instructions that know registers only."""

from ..encoder import Encoder, encodes
from ..syntax import SIZE, WIDTH

_ASSUMED = ("rn", "approx", "full", "sync", "aligned")  # parts of a name that change nothing here
_WIDER = {"s32": "s64", "u32": "u64", "s16": "s32", "u16": "u32"}
_MULTIFUNCTION = ("lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div")


def _unit(base: str, type_name: str) -> str:
    if type_name in ("f32", "f32x2"):
        if base in ("fma", "ex2"):
            return {"fma": "FMA32", "ex2": "EX2"}[base]
        return "MUFU" if base in _MULTIFUNCTION else "F32"
    if type_name in ("f16", "bf16", "f16x2", "bf16x2"):
        return "F16"
    return "OTHER" if type_name == "f64" else "INT"


_UNARY = ("neg", "abs", "not", "popc", "clz", "brev", "bfind")
_UNARY += ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh")
_BINARY = ("add", "sub", "mul", "div", "rem", "min", "max", "and", "or", "xor", "shl", "shr", "copysign")
_TERNARY = ("mad", "fma", "bfe", "shf", "prmt")
_SOURCES = dict.fromkeys(_UNARY, 1) | dict.fromkeys(_BINARY, 2) | dict.fromkeys(_TERNARY, 3)


@encodes(*_SOURCES)
def _arithmetic(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    base, type_name = parts[0], parts[-1]
    of_three = base in ("min", "max") and type_name == "f32" and len(operands) == 4
    if len(operands) - 1 != _SOURCES[base] + of_three:
        raise encoder.unknown("operands")
    if type_name == "pred":
        sources = [encoder.predicate(text, place) for place, text in enumerate(operands[1:], 1)]
        encoder.emit(f"{base}.pred", [encoder.destination(operands[0], "pred"), *sources], 1, unit="INT")
        return
    types = [type_name] * 4  # of the destination and three sources
    mixed = parts[-2] == "f32" and type_name in ("bf16", "f16")  # factors, or what is added to, of 16 bits
    if mixed:
        types = ["f32", type_name, type_name if base == "fma" else "f32", "f32"]
    if "wide" in parts:
        types[0] = types[3] = _WIDER[type_name]
    if base in ("popc", "clz", "bfind"):
        types[0] = "u32"
    if base in ("shl", "shr"):
        types[2] = "u32"
    if base == "bfe":
        types[2] = types[3] = "u32"
    named = type_name.replace("b", "u") if base == "shr" else type_name
    name = ".".join([base + "3" * of_three, *(part for part in parts[1:-1] if part not in _ASSUMED), named])
    sources = [encoder.source(text, source) for text, source in zip(operands[1:], types[1:], strict=False)]
    encoder.emit(
        name, [encoder.destination(operands[0], types[0]), *sources], 1, unit=_unit(base, "f32" if mixed else type_name)
    )


@encodes("bfi", "lop3")
def _bits(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    base, type_name = parts[0], parts[-1]
    if len(operands) != 5:
        raise encoder.unknown()
    types = (type_name, type_name, "u32", "u32") if base == "bfi" else ("b32",) * 4
    sources = [encoder.source(text, source) for text, source in zip(operands[1:], types, strict=True)]
    encoder.emit(f"{base}.{type_name}", [encoder.destination(operands[0], type_name), *sources], 1, unit="INT")


@encodes("selp")
def _selp(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    bits = f"b{8 * WIDTH[parts[-1]]}"
    sources = [encoder.source(text, parts[-1]) for text in operands[1:3]]
    which = encoder.predicate(operands[3], 3)
    encoder.emit(f"selp.{bits}", [encoder.destination(operands[0], bits), *sources, which], 1, unit="INT")


@encodes("setp")
def _setp(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    comparison, type_name = parts[1], parts[-1]
    comparison = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(comparison, comparison)
    joined = [part for part in parts[2:-1] if part != "ftz"]  # subnormal numbers compare like what they are
    destinations = [encoder.destination(name, "pred") for name in operands[0].split("|")]
    places = destinations + [encoder.source(text, type_name) for text in operands[1:3]]
    if joined:
        places.append(encoder.predicate(operands[3], len(places)))
    how = {"and": 1, "or": 2, "xor": 3}[joined[0]] if joined else 0
    unit = "F32" if type_name == "f32" else "INT"
    encoder.emit(f"setp.{comparison}.{type_name}", places, len(destinations), how, unit=unit)


@encodes("mov")
def _mov(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    type_name = parts[-1]
    if type_name == "pred":
        encoder.emit("mov.pred", [encoder.destination(operands[0], "pred"), encoder.predicate(operands[1], 1)], 1)
        return
    bits = 8 * WIDTH[type_name]
    if operands[0].startswith("{"):
        into = encoder.group(operands[0])
        part = f"b{bits // len(into)}"
        places = [encoder.allocate(4) if name == "_" else encoder.destination(name, part) for name in into]
        encoder.emit(f"unpack.{part}.b{bits}", [*places, encoder.source(operands[1], type_name)], len(into))
    elif operands[1].startswith("{"):
        of = encoder.group(operands[1])
        part = f"b{bits // len(of)}"
        places = [encoder.source(text, part) for text in of]
        encoder.emit(f"pack.b{bits}.{part}", [encoder.destination(operands[0], type_name), *places], 1)
    else:
        places = encoder.destination(operands[0], type_name), encoder.source(operands[1], type_name)
        encoder.emit(f"mov.b{bits}", places, 1)


_ROUNDING = {"rn": 0, "rz": 1, "rm": 2, "rp": 3, "rni": 4, "rzi": 5, "rmi": 6, "rpi": 7, "rna": 0}  # conversions.cpp


@encodes("cvt")
def _cvt(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    to, of, modifiers = parts[-2], parts[-1], parts[1:-2]
    rounding = sum(_ROUNDING.get(part, 0) for part in modifiers)
    narrow_float = to in ("f16", "bf16", "f16x2", "bf16x2")
    if set(modifiers) - {*_ROUNDING, "ftz", "sat"} or (narrow_float and rounding and (to, rounding) != ("bf16", 1)):
        raise encoder.unknown()
    if to in ("bf16x2", "f16x2"):
        places = [encoder.destination(operands[0], "b32"), *(encoder.source(text, "f32") for text in operands[1:])]
        encoder.emit(f"cvt.{to}.f32", places, 1, unit="CVT")
        return
    source = operands[1]
    if to[0] in "us" and of[0] in "us":
        if SIZE[to] == 1 or SIZE[of] == 1:
            raise encoder.unknown()
        if encoder.register_width(source, 0) == 8 and WIDTH[of] == 4:  # the lower half of a wider register
            low = encoder.allocate(4)
            encoder.emit("truncate.b64", [low, encoder.source(source, "u64")], 1)
            encoder.emit(f"cvt.{to}.{of}", [encoder.destination(operands[0], to), low], 1, rounding, unit="CVT")
            return
    places = encoder.destination(operands[0], to), encoder.source(source, of)
    encoder.emit(f"cvt.{to}.{of}", places, 1, rounding, "ftz" in modifiers, "sat" in modifiers, unit="CVT")


@encodes("cvta")
def _cvta(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    name = ".".join(part for part in parts if part != "u64")
    encoder.emit(name, [encoder.destination(operands[0], "u64"), encoder.source(operands[1], "u64")], 1, unit="INT")
