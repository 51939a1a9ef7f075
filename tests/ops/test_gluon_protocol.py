"""How the producer and the consumers of the kernels in Gluon wait for one another: recorded from their own code.

In no order may they wait for ever, read another block than theirs, or load over one that a product still reads. Rings
and mbarriers have numbers here: in this order the kernels allocate shared memory.
"""

from collections.abc import Callable
from itertools import chain, pairwise
from typing import NamedTuple

import pytest
from gluon_recorder import UNKNOWN, protocol_of
from mbarriers import Arrive, Expect, Kernel, Multiply, Operation, Wait, WaitProducts, explore
from ptx.emulated import needs_gluon

pytestmark = needs_gluon

PLAIN = dict.fromkeys(
    ["anchors", "order", "in_order", "grad_lse", "thought_lengths", "key_start", "row_anchor", "row_start", "row_grad",
     "start_bounds", "window", "step_window", "curve_scale"]
) | dict.fromkeys(["STEPS", "GROUP", "GROUP_ANCHORS", "THOUGHT_ANCHORS", "DIAGONAL_N"], 1) | {
    "CAUSAL": True, "PER_ANCHOR": False, "HEAD": 64, "BLOCK_D": 64, "VALUE_HEAD": 64, "BLOCK_V": 64, "BLOCK_M": 128,
    "BLOCK_N": 128, "BOX_T": 16,
}  # fmt: skip


class InTurn(NamedTuple):
    """A product that one group begins, then the other, then the first again."""

    def do(self, state: dict, part: int) -> None:
        assert state.get(("last", None), 2) != part, "out of turn"
        state["last", None] = part


def forward(blocks: int, stages: int, thoughts: int = 1) -> Kernel:
    """``blocks`` of base keys, half of them masked, behind some of thought keys."""
    from quietstar.ops.thought_attention.gluon_forward import gluon_forward_kernel

    keys, values, all_blocks = 2, 5, thoughts + blocks
    reads = [(ring, i) for i in range(thoughts) for ring in (keys, values)] + [(keys, thoughts)]
    for i in range(thoughts + 1, all_blocks):
        reads += [(keys, i), (values, i - 1)]
    reads += [(values, all_blocks - 1)]
    stubs = {"base_blocks": lambda *_: (UNKNOWN, UNKNOWN, UNKNOWN, (blocks + 1) // 2, UNKNOWN, blocks)}
    kernel = protocol_of(gluon_forward_kernel, reads, stubs, **PLAIN | {"STAGES": stages, "chunks": thoughts})
    return kernel._replace(parts=[in_turns(part, keys) for part in kernel.parts])


def in_turns(part: list[Operation], keys: int) -> list[Operation]:
    turns = []
    for operation in part:
        if isinstance(operation, Multiply) and operation.operands[0].place[0] == keys:
            turns.append(InTurn())
        turns.append(operation)
    return turns


def query_gradient(blocks: int, stages: int, masked: int = 1) -> Kernel:
    """``blocks`` that all rows see, behind ``masked`` ones of base keys, and as many of thought keys."""
    from quietstar.ops.thought_attention.gluon_backward_query import BLOCK_N, gluon_query_gradient_kernel

    keys, values = 0, 1
    reads = []
    for i in range(blocks):
        reads += [(keys, i), (values, i)] + [(keys, i - 1)] * (i > 0)
    reads += [(keys, blocks - 1)] * (blocks > 0)
    full = 0, blocks * BLOCK_N.value
    stubs = {
        "STAGES": stages,
        "base_range": lambda *_: (*full, UNKNOWN, UNKNOWN, masked, UNKNOWN, UNKNOWN),
        "diagonal_end": lambda *_: masked,
    }
    return protocol_of(gluon_query_gradient_kernel, reads, stubs, **PLAIN)


def key_gradient(blocks: int, stages: int, masked: int = 1) -> Kernel:
    """``blocks`` of rows, of which the first ``masked`` ones have a mask."""
    from quietstar.ops.thought_attention.gluon_backward_key import gluon_key_gradient_kernel

    key, value, query, grad_output, log_sum, delta = range(6)
    reads = []
    for i in range(blocks):
        reads += [(key, 0), (query, i), (delta, i), (value, 0), (grad_output, i), (log_sum, i)]
        reads += [(grad_output, i), (query, i)]
    stubs = {"_tiles_of": lambda *_: (*[UNKNOWN] * 8, min(masked, blocks), blocks)}
    return protocol_of(gluon_key_gradient_kernel, reads, stubs, **PLAIN | {"STAGES": stages})


@pytest.mark.parametrize(
    ("kernel", "stages", "before"),
    [
        *((forward, stages, before) for stages in (2, 3) for before in (1, 3)),
        *((query_gradient, stages, before) for stages, before in [(3, 0), (3, 1), (4, 0)]),
        *((key_gradient, stages, before) for stages in (1, 2, 4) for before in (0, 1, 100)),
    ],
)
def test_no_order_is_wrong(kernel, stages, before):
    for blocks in {1 if kernel is forward else 0, 1, 2, stages, stages + 1, 3 * stages + 2}:
        explore(kernel(blocks, stages, before))


def test_the_kernels_have_as_many_stages():
    from quietstar.ops.thought_attention import gluon_backward_key, gluon_backward_query, gluon_launch

    assert {tile.stages for tile in gluon_launch.TILES.values()} <= {2, 3}
    assert gluon_backward_query.STAGES.value == 3
    assert gluon_backward_key.STAGES == 4


@pytest.mark.parametrize(("kernel", "stages"), [(forward, 1), (query_gradient, 2)])
def test_fewer_stages_are_not_enough(kernel, stages):
    with pytest.raises(AssertionError, match="for ever"):
        explore(kernel(3, stages))


def in_place_of(kind: type, change: Callable[[Operation], list[Operation]]) -> Callable:
    """The fault that ``change`` makes of the operations of a kind at one barrier."""

    def fault(part: list[Operation], barrier: int) -> list[Operation]:
        changed = (
            change(operation) if isinstance(operation, kind) and operation.barrier[0] == barrier else [operation]
            for operation in part
        )
        return list(chain.from_iterable(changed))

    return fault


def released_too_early(part: list[Operation], barrier: int) -> list[Operation]:
    part = part.copy()
    for i, (before, operation) in enumerate(pairwise(part)):
        if isinstance(before, WaitProducts) and isinstance(operation, Arrive) and operation.barrier[0] == barrier:
            part[i : i + 2] = operation, before
    return part


def dropped(_: Operation) -> list[Operation]:
    return []


FAULTS = {
    "released too early": (released_too_early, "over what is read"),
    "never released": (in_place_of(Arrive, dropped), "for ever"),
    "released twice": (in_place_of(Arrive, lambda arrive: [arrive, arrive]), None),
    "not waited for": (in_place_of(Wait, dropped), "over what is read|another content|turn"),
    "other phase": (in_place_of(Wait, lambda wait: [wait._replace(parity=wait.parity ^ 1)]), None),
    "expects too little": (in_place_of(Expect, lambda expect: [expect._replace(loads=expect.loads - 1)]), None),
    "expects too much": (in_place_of(Expect, lambda expect: [expect._replace(loads=expect.loads + 1)]), "for ever"),
}
"""What becomes of the operations of a part at one mbarrier, and what is said of it, if that does not depend."""
SOUND = pytest.mark.parametrize(("kernel", "stages"), [(forward, 2), (query_gradient, 3), (key_gradient, 4)])


@SOUND
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_at_every_mbarrier(kernel, stages, fault):
    sound = kernel(2 * stages + 2, stages)
    fault, message = FAULTS[fault]
    found = 0
    for barrier in {array for array, _ in sound.counts}:
        before, *parts = (fault(part, barrier) for part in (sound.before, *sound.parts))
        if (faulty := Kernel(sound.counts, before, parts)) != sound:
            with pytest.raises(AssertionError, match=message):
                explore(faulty)
            found += 1
    assert found


@SOUND
@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_count_is_seen_at_every_mbarrier(kernel, stages, change):
    sound = kernel(2 * stages + 2, stages)
    for barrier in {array for array, _ in sound.counts}:
        counts = {place: count + change * (place[0] == barrier) for place, count in sound.counts.items()}
        if 0 not in counts.values():
            with pytest.raises(AssertionError):
                explore(sound._replace(counts=counts))


@SOUND
def test_each_missing_release_is_seen(kernel, stages):
    sound = kernel(3 * stages, stages)
    for part, operations in enumerate(sound.parts):
        for i, operation in enumerate(operations[: len(operations) // 2]):  # nobody waits for the last ones
            if isinstance(operation, Arrive):
                faulty = [*sound.parts[:part], operations[:i] + operations[i + 1 :], *sound.parts[part + 1 :]]
                with pytest.raises(AssertionError):
                    explore(sound._replace(parts=faulty))
