"""A warp-specialised kernel, right and broken; for `pytest --emulate` alone, which test_emulated_gluon.py starts."""

import re
from collections import Counter

import pytest
import torch
from tolerances import assert_as_accurate

from ptx import gluon_forward
from ptx.gluon_mutations import Subject, each
from ptx.launches import schedule
from quietstar.ops import thought_attention


def made(batches, length, steps, thought_steps, heads, kv_heads, dim, anchors=None):
    """Tensors as the kernel takes them, and anchors as a tensor or None."""
    num_anchors = length if anchors is None else len(anchors)
    query = torch.randn(batches, num_anchors * steps, heads, dim, dtype=torch.bfloat16)
    query = query.transpose(1, 2).unflatten(2, (num_anchors, steps))
    base = [torch.randn(batches, length, kv_heads, dim, dtype=torch.bfloat16) for _ in range(2)]
    thoughts = [torch.randn(batches, num_anchors, thought_steps, kv_heads, dim, dtype=torch.bfloat16) for _ in range(2)]
    anchors = anchors and torch.tensor([anchors]).expand(batches, -1).contiguous()
    return (query, *base, *thoughts), anchors


def references(tensors, anchors):
    """Output and lse in bfloat16 and in float64."""
    query, *rest = tensors
    for dtype in (torch.bfloat16, torch.float64):
        keys = [x.movedim(-2, 1).to(dtype) for x in rest]
        with torch.no_grad():
            yield thought_attention(query.to(dtype), *keys, anchors=anchors, return_lse=True, backend="reference")


def assert_right(actual, expected):
    for name, *values in zip(("output", "lse"), actual, *expected, strict=True):
        assert_as_accurate(*values, unit=torch.bfloat16, name=name)


# Four tiles of up to five blocks of 128 base keys, masked and full, so that the rings turn several times.
SPREAD = [10 + 55 * i for i in range(8)] + [400 + 28 * i for i in range(8)] + [608 + 2 * i for i in range(16)]
SMALL = (1, 320, 4, 4, 4, 1, 64, [anchor // 2 for anchor in SPREAD])  # the same in blocks of 64
CASES = {
    "small": (SMALL, {"block_n": 64}),
    "D 64, group of 4": ((1, 150, 4, 4, 8, 2, 64), {}),
    "S 2, T 3, group of 2": ((1, 200, 2, 3, 4, 2, 128), {}),
    "two batches": ((2, 200, 4, 4, 4, 1, 128), {}),
    "spread": ((1, 640, 4, 4, 4, 1, 128, SPREAD), {}),
    "spread, three stages": ((1, 640, 4, 4, 4, 1, 128, SPREAD), {"stages": 3}),
}
CASES |= {f"L {length}, S = T = 4": ((1, length, 4, 4, 4, 1, 128), {}) for length in (1, 128, 129, 256, 300)}
CASES |= {f"L {length}, S = T = 14": ((1, length, 14, 14, 4, 1, 128), {}) for length in (7, 128)}
CASES["L 300, S = T = 14, three stages"] = ((1, 300, 14, 14, 4, 1, 128), {"stages": 3})


@pytest.mark.parametrize("name", CASES)
def test_right(name, emulated_launches):
    sizes, options = CASES[name]
    tensors, anchors = made(*sizes)
    expected = list(references(tensors, anchors))
    for schedule.order in range(7) if name == "small" else (3, 4, 5):
        assert_right(gluon_forward.forward(*tensors, anchors, **options), expected)


def test_too_many_thoughts_for_a_block():
    tensors, _ = made(1, 20, 1, 12, 4, 1, 64)
    with pytest.raises(ValueError, match="must fit into block_n"):
        gluon_forward.forward(*tensors)


TRY = "mbarrier.try_wait.parity.shared::cta.b64 complete,"
WAIT = rf"^\s*{re.escape(TRY)} \[(%r\d+)\], (%r\d+);"
EXPECT = r"mbarrier\.arrive\.expect_tx(\.shared::cta\.b64 _, \[%r\d+\]), (\d+);"
LOAD = r"cp\.async\.bulk\.tensor[^;]*"
BROKEN = {
    "wait dropped": each(WAIT, "mov.pred complete, -1;"),
    "wait for the other parity": each(WAIT, rf".reg .b32 flipped; xor.b32 flipped, \2, 1; {TRY} [\1], flipped;"),
    "bytes not expected": each(EXPECT, r"mbarrier.arrive\1;"),
    "half of the bytes expected": each(
        EXPECT, lambda match: f"mbarrier.arrive.expect_tx{match[1]}, {int(match[2]) // 2};"
    ),
    "arrival dropped": each(r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];"),
    "arrival that expects bytes dropped": each(r"@%p\d+ " + EXPECT),
    "load dropped": each(rf"@%p\d+ {LOAD};"),
    "load of the wrong rows": each(rf"({LOAD}\{{%r\d+, )(%r\d+)(\}}\][^;]*;)", r"\1%r1\3"),
    "mbarrier of another count": each(
        r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\]), (\d);", lambda match: f"{match[1]}, {3 - int(match[2])};"
    ),
    "mbarrier not initialised": each(r"@%p\d+ mbarrier\.init\.shared::cta\.b64 \[%r\d+\], \d;"),
    "barrier of a group dropped": each(r"^\s*bar\.sync\s+\d+, 128;"),
    "barrier of all dropped": each(r"^\s*barrier\.sync\s+1;"),
    "shared memory not fenced": each(r"^\s*fence\.proxy\.async\.shared::cta;"),
    "product not waited for": each(r"^\s*wgmma\.wait_group\.sync\.aligned \d+;"),
    "one product too many in flight": each(r"^(\s*wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;"),
    "product not fenced": each(r"^\s*wgmma\.fence\.sync\.aligned;"),
    "registers of another number": each(
        r"(setmaxnreg\.\w+\.sync\.aligned\.u32 )\t?(\d+);", lambda match: f"{match[1]}{int(match[2]) - 8 or 32};"
    ),
}


# What is not caught: by line of the kernel, how many of the instructions that it became, and why.
MISSED = {
    "wait dropped": {
        # The first group's first turn, which it has from the start.
        "mbarrier.wait(my_turn, 0)": 1,
        # The group whose turn is second gets it from the other, which has waited for the same load.
        "mbarrier.wait(k_full.index(0), 0)": 1,
        "mbarrier.wait(v_full.index(0), 0)": 1,
        "mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)": 2,
        # The loop's first round stands in front of it, and there both pass at once.
        "mbarrier.wait(k_empty.index(stage), phase ^ 1)": 1,
        "mbarrier.wait(v_empty.index(stage), phase ^ 1)": 1,
    },
    "barrier of a group dropped": {
        # The thread that arrives has also initialised it.
        "mbarrier.arrive(turns.index(0), count=1)": 1,
        # The load of K that this would let through waits for V's arrival too, which comes behind.
        "mbarrier.arrive(k_empty.index(stage), count=1)": 4,
        # Turns decide only who is first. One that is given too early shows in rare orders, as an arrival too many.
        "mbarrier.arrive(other_turn, count=1)": 2,
    },
    # Those of a partition that no warp runs.
    "barrier of all dropped": {"def gluon_forward_kernel(": 2},
    # There are still enough: test_gluon_registers.py.
    "registers of another number": {
        "def gluon_forward_kernel(": 4,
        "gl.store(lse + place, (peak + gl.log2(total)) * LN_2, mask=index < num_rows)": 1,
    },
}


QUICK = ("bytes not expected", "arrival dropped", "shared memory not fenced", "product not waited for",
         "product not fenced", "load of the wrong rows")  # fmt: skip


@pytest.fixture
def subject(emulated_launches) -> Subject:
    tensors, anchors = made(*SMALL)
    expected = list(references(tensors, anchors))
    return Subject(
        gluon_forward,
        lambda: assert_right(gluon_forward.forward(*tensors, anchors, block_n=64), expected),
        emulated_launches,
    )


@pytest.mark.parametrize("what", BROKEN)
def test_caught(what, subject):
    assert subject.missed(BROKEN[what]) <= Counter(MISSED.get(what, {}))


def test_first_ones_are_caught(subject):
    for what in QUICK:
        _, ptx = next(BROKEN[what](subject.ptx))
        assert subject.is_caught(ptx), what
