"""Branches, barriers, and what the lanes of a warp do together."""

from ..encoder import BARRIER, BRANCH, COLLECTIVE, EXIT, INDEXED_BRANCH, Encoder, encodes
from ..syntax import number


@encodes("bra")
def _bra(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    encoder.emit("bra", [], 0, kind=BRANCH, target=encoder.label(operands[0]))


@encodes("brx")
def _brx(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    table = encoder.find(encoder.tables, operands[1])
    if table is None:
        raise encoder.unknown(f"table {operands[1]}")
    targets = [encoder.label(name) for name in table]
    encoder.emit("brx", [encoder.source(operands[0], "u32"), *targets], 0, kind=INDEXED_BRANCH)


@encodes("ret", "exit")
def _exit(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    encoder.emit("exit", [], 0, kind=EXIT)


@encodes("trap")
def _trap(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    encoder.emit("trap", [], 0)


@encodes("bar", "barrier")
def _barrier(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    if parts[1] == "warp":
        encoder.emit("bar.warp", [encoder.source(operands[0], "b32")], 0, kind=COLLECTIVE)
        return
    numbers = [number(text) for text in operands]
    known = {"bar", "barrier", "sync", "arrive", "aligned", "cta"}
    if not known.issuperset(parts) or None in numbers or not 0 <= numbers[0] < 16 or len(numbers) > 2:
        raise encoder.unknown()
    which, threads = numbers if len(numbers) == 2 else (numbers[0], -1)
    if "arrive" in parts:
        encoder.emit("bar.arrive", [], 0, which, threads)
    else:
        encoder.emit("bar.sync", [], 0, which, threads, kind=BARRIER)


@encodes("shfl")
def _shfl(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    names = [name.strip() for name in operands[0].split("|")]
    types = "b32", "pred"
    places = [encoder.destination(name, type_name) for name, type_name in zip(names, types, strict=False)]
    sources = [encoder.source(text, "b32") for text in operands[1:5]]
    mode = ("up", "down", "bfly", "idx").index(parts[2])
    encoder.emit("shfl", places + sources, len(places), mode, kind=COLLECTIVE)


@encodes("vote")
def _vote(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    mode = parts[2]
    place = encoder.destination(operands[0], "b32" if mode == "ballot" else "pred")
    sources = encoder.predicate(operands[1], 1), encoder.source(operands[2], "b32")
    encoder.emit(f"vote.{mode}", [place, *sources], 1, kind=COLLECTIVE)


@encodes("redux", "match")
def _over_the_warp(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    name = ".".join(part for part in parts if part != "sync")
    sources = [encoder.source(text, "b32") for text in operands[1:3]]
    encoder.emit(name, [encoder.destination(operands[0], "b32"), *sources], 1, kind=COLLECTIVE)


@encodes("elect")
def _elect(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    leader, chosen = operands[0].split("|")
    places = encoder.destination(leader, "b32"), encoder.destination(chosen, "pred")
    encoder.emit("elect", [*places, encoder.source(operands[1], "b32")], 2, kind=COLLECTIVE)


@encodes("activemask")
def _activemask(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    encoder.emit("activemask", [encoder.destination(operands[0], "b32")], 1)
