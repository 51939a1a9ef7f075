"""cp.async, TMA, mbarriers and fences."""

import re

from ..encoder import Encoder, encodes
from ..syntax import number, split_operands

_TENSOR_LOAD = re.compile(
    r"cp\.async\.bulk\.tensor\.([1-5])d\.shared::(cta|cluster)\.global(\.tile)?"
    r"\.mbarrier::complete_tx::bytes(\.L2::cache_hint)?"
)
_TENSOR_STORE = re.compile(
    r"cp(\.reduce)?\.async\.bulk\.tensor\.([1-5])d\.global\.shared::cta(?:\.(add|min|max))?(?:\.tile)?"
    r"\.bulk_group(?:\.L2::cache_hint)?"
)
_REDUCTIONS = (None, "add", "min", "max")  # as tma_stores.cpp numbers them


@encodes("cp")
def _copy(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    what = "bulk" if "bulk" in parts else parts[2]
    if "async" not in parts[1:3]:
        raise encoder.unknown()
    if what == "bulk":
        _bulk(encoder, parts, operands)
    elif what == "commit_group":
        encoder.emit("cp.async.commit_group", [], 0)
    elif what == "wait_group":
        encoder.emit("cp.async.wait_group", [], 0, number(operands[0]), False)
    elif what == "wait_all":
        encoder.emit("cp.async.wait_group", [], 0, 0, True)
    elif what in ("ca", "cg"):
        to, offset, width = encoder.address(operands[0])
        source, source_offset, source_width = encoder.address(operands[1])
        more = operands[3:-1] if any("cache_hint" in part for part in parts) else operands[3:]
        if source_width != 8 or len(more) > 1 or (more and encoder.register_width(more[0], 4) != 4):
            raise encoder.unknown()
        places = [to, source, *(encoder.source(text, "u32") for text in more)]
        encoder.emit("cp.async", places, 0, offset, width, source_offset, number(operands[2]), len(more))
    else:
        raise encoder.unknown()


def _bulk(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    name = ".".join(parts)
    if load := _TENSOR_LOAD.fullmatch(name):
        descriptor, descriptor_offset, coordinates = _tensor(encoder, operands[1], int(load[1]))
        to, offset, width = encoder.address(operands[0])
        mbarrier, mbarrier_offset, mbarrier_width = encoder.address(operands[2])
        encoder.emit(
            "tma.load", [to, descriptor, *coordinates, mbarrier], 0,
            offset, width, len(coordinates), mbarrier_offset, mbarrier_width, descriptor_offset,
        )  # fmt: skip
    elif store := _TENSOR_STORE.fullmatch(name):
        descriptor, descriptor_offset, coordinates = _tensor(encoder, operands[0], int(store[2]))
        source, offset, width = encoder.address(operands[1])
        if bool(store[1]) != bool(store[3]):
            raise encoder.unknown()
        reduction = _REDUCTIONS.index(store[3])
        encoder.emit(
            "tma.store", [source, descriptor, *coordinates], 0,
            offset, width, len(coordinates), 0, 0, descriptor_offset, reduction,
        )  # fmt: skip
    elif name == "cp.async.bulk.commit_group":
        encoder.emit("tma.commit_group", [], 0)
    elif name in ("cp.async.bulk.wait_group", "cp.async.bulk.wait_group.read"):
        encoder.emit("tma.wait_group", [], 0, number(operands[0]), parts[-1] == "read")
    else:
        raise encoder.unknown()


def _tensor(encoder: Encoder, operand: str, rank: int) -> tuple[int, int, list[int]]:
    """``[descriptor, {coordinates}]``: place and offset of the first, places of the others."""
    tensor, coordinates = split_operands(operand.strip()[1:-1])
    descriptor, offset, width = encoder.address(f"[{tensor}]")
    coordinates = [encoder.source(text, "s32") for text in encoder.group(coordinates)]
    if len(coordinates) != rank or width != 8:
        raise encoder.unknown()
    return descriptor, offset, coordinates


@encodes("mbarrier")
def _mbarrier(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    what = parts[1]
    if parts[-1] != "b64" or {"cluster", "shared::cluster", "noComplete"} & set(parts):
        raise encoder.unknown()
    if what in ("init", "inval"):
        place, offset, width = encoder.address(operands[0])
        count = [encoder.source(operands[1], "u32")] if what == "init" else []
        encoder.emit(f"mbarrier.{what}", [place, *count], 0, offset, width)
    elif what == "expect_tx":
        place, offset, width = encoder.address(operands[0])
        encoder.emit("mbarrier.arrive", [place, encoder.source(operands[1], "u32")], 0, offset, width, 1, 0, 1, 0)
    elif what == "arrive":
        state = [] if operands[0] == "_" else [encoder.destination(operands[0], "b64")]
        place, offset, width = encoder.address(operands[1])
        count = [encoder.source(text, "u32") for text in operands[2:]]
        encoder.emit(
            "mbarrier.arrive", [*state, place, *count], len(state),
            offset, width, "expect_tx" in parts, 1, len(count), len(state), "relaxed" in parts,
        )  # fmt: skip
    elif what in ("try_wait", "test_wait"):
        by_parity = "parity" in parts
        place, offset, width = encoder.address(operands[1])
        phase = encoder.source(operands[2], "u32" if by_parity else "b64")
        done = encoder.destination(operands[0], "pred")
        encoder.emit("mbarrier.wait", [done, place, phase], 1, offset, width, by_parity)
    else:
        raise encoder.unknown()


@encodes("fence")
def _fence(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    if parts[1:3] == ["proxy", "async"]:
        encoder.emit("fence.proxy.async", [], 0)
    elif parts[1] == "mbarrier_init":
        encoder.emit("fence.mbarrier_init", [], 0)
    elif parts[1] in ("sc", "acq_rel"):  # blocks run one after another, the threads of one in a single order
        encoder.emit("nop", [], 0)
    else:
        raise encoder.unknown()


@encodes("setmaxnreg")
def _setmaxnreg(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    encoder.emit("setmaxnreg", [], 0, number(operands[0]), "inc" in parts)


@encodes("nanosleep")
def _nanosleep(encoder: Encoder, parts: list[str], operands: list[str]) -> None:
    encoder.emit("nanosleep", [], 0)
