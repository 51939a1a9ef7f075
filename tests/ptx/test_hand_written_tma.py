"""TMA stores and reductions written by hand: where they write, and who must wait for them."""

import struct

import pytest
import torch

from ptx.emulated import needs_compiler
from ptx.hand_written import ORDERS, START, launched, swizzled_pieces
from ptx.tensor_map import SWIZZLES, tensor_map

pytestmark = needs_compiler

PARAMETERS = ".param .u64 in, .param .u64 out, .param .align 64 .b8 map[128]"
# %rd1: what to store, as it is to lie in shared memory; %rd2: the tensor; %rd3: its descriptor; %p4: one thread.
BEGIN = (
    START
    + """
ld.param.b64 %rd1, [in]; ld.param.b64 %rd2, [out]; mov.b32 %r9, map; cvt.u64.u32 %rd4, %r9; cvta.param.u64 %rd3, %rd4;
elect.sync %r20|%p5, -1; and.pred %p4, %p5, %p2; mov.b32 %r10, COLUMN; mov.b32 %r11, ROW;
"""
)
FILL = """
shl.b32 %r12, %r3, 2; add.s32 %r13, %r1, %r12; cvt.u64.u32 %rd5, %r12; add.s64 %rd6, %rd1, %rd5; mov.b32 %r14, 0;
L: ld.global.b32 %r15, [%rd6]; st.shared.b32 [%r13], %r15;
add.s32 %r13, %r13, 256; add.s64 %rd6, %rd6, 256; add.s32 %r14, %r14, 256; setp.lt.u32 %p6, %r14, BYTES; @%p6 bra L;
"""
FENCE, BARRIER = "fence.proxy.async.shared::cta;", "bar.sync 0;"
ISSUE = "@%p4 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd3, {%r10, %r11}], [%r1];"
COMMIT, WAIT = "cp.async.bulk.commit_group;", "cp.async.bulk.wait_group 0;"
WAIT_FOR_READ = "cp.async.bulk.wait_group.read 0;"


def reduce(what):
    return ISSUE.replace("cp.", "cp.reduce.").replace("cta.", f"cta.{what}.")


def stored(body, tensor, data, box, mode=0, place=(0, 0), order=0, blocks=1):
    """A launch of two warps; ``data`` is the box as it lies in shared memory."""
    body = (
        (BEGIN + body).replace("BYTES", str(data.nbytes)).replace("ROW", str(place[0])).replace("COLUMN", str(place[1]))
    )
    pointers = struct.pack("<QQ", data.data_ptr(), tensor.data_ptr())
    descriptor = tensor_map(tensor, tensor.shape, tensor.stride(), box, mode)
    parameters = pointers + bytes(48) + descriptor
    return launched(body, PARAMETERS, parameters, threads=64, order=order, tensors=[tensor, data], blocks=blocks)


WHOLE = FILL + FENCE + BARRIER + ISSUE + COMMIT + WAIT


@pytest.mark.parametrize("place", [(0, 0), (3, 8), (30, 64), (-3, -5), (39, 71), (100, 100)], ids=str)
@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_boxes_of_tensors(swizzle, place):
    """What of the box lies outside of the tensor is not written."""
    mode = SWIZZLES[swizzle]
    rows, columns = 16, {0: 64, 1: 16, 2: 32, 3: 64}[mode]
    tensor = torch.full((40, 72), -1, dtype=torch.int16)
    box = torch.arange(rows * columns, dtype=torch.int16).view(rows, columns)
    pieces = box.view(-1, 8)
    data = torch.empty_like(pieces)
    data[swizzled_pieces(len(pieces), mode)] = pieces
    expected = tensor.clone()
    for row in range(rows):
        for column in range(columns):
            y, x = place[0] + row, place[1] + column
            if 0 <= y < 40 and 0 <= x < 72:
                expected[y, x] = box[row, column]
    for order in ORDERS:
        tensor.fill_(-1)
        assert stored(WHOLE, tensor, data, (rows, columns), mode, place, order).faults() == []
        assert torch.equal(tensor, expected)


INTEGERS, HALVES = (torch.int32, torch.int64), (torch.float16, torch.bfloat16)
REDUCTIONS = [("add", dtype) for dtype in (*INTEGERS, *HALVES, torch.float32)]
REDUCTIONS += [(what, dtype) for what in ("min", "max") for dtype in (*INTEGERS, *HALVES)]


@pytest.mark.parametrize(("what", "dtype"), REDUCTIONS)
def test_reductions(what, dtype):
    """By two blocks: rounded to the tensor's own type each time."""
    tensor, data = ((torch.randn(8, 16) * 100).to(dtype) for _ in range(2))
    body = FILL + FENCE + BARRIER + reduce(what) + COMMIT + WAIT_FOR_READ
    combine = {"add": torch.add, "min": torch.minimum, "max": torch.maximum}[what]
    expected = combine(combine(tensor, data), data)
    assert stored(body, tensor, data, (8, 16), blocks=2).faults() == []
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize(("what", "dtype"), [("max", torch.float32), ("add", torch.float64), ("min", torch.int16)])
def test_reductions_that_there_are_not(what, dtype):
    tensor = torch.zeros(8, 16, dtype=dtype)
    assert "TMA reduction" in stored(FILL + FENCE + BARRIER + reduce(what), tensor, tensor + 1, (8, 16)).failure


OVERWRITE, OTHERS_OVERWRITE = "@%p4 st.shared.b32 [%r1+8], %r3;", "@%p3 st.shared.b32 [%r7], %r3;"
READ_BACK, OTHERS_READ_BACK = "@%p4 ld.global.b32 %r15, [%rd2];", "@%p3 ld.global.b32 %r15, [%rd2];"
BLOCK_0, BLOCK_1 = "mov.u32 %r16, %ctaid.x; setp.ne.b32 %p9, %r16, 0; @%p9 bra N;", "bra E; N:"
READY = FILL + FENCE + BARRIER
RIGHT = {
    "overwritten behind the wait for its reading": READY + ISSUE + COMMIT + WAIT_FOR_READ + OVERWRITE,
    "by others, behind a barrier too": READY + ISSUE + COMMIT + WAIT_FOR_READ + BARRIER + OTHERS_OVERWRITE,
    "read back": READY + ISSUE + COMMIT + WAIT + READ_BACK,
    "read back by others": READY + ISSUE + COMMIT + WAIT + BARRIER + OTHERS_READ_BACK,
    "fenced by the reader": FILL + BARRIER + FENCE + ISSUE + COMMIT + WAIT,
    "two reductions of the same": READY + (reduce("add") + COMMIT) * 2 + WAIT,
    "an older group waited for": READY
    + ISSUE
    + COMMIT
    + "add.s32 %r11, %r11, 8; add.s32 %r1, %r1, 512;"
    + ISSUE
    + COMMIT
    + "cp.async.bulk.wait_group.read 1; add.s32 %r1, %r1, -512;"
    + OVERWRITE
    + WAIT_FOR_READ,
}
WRONG = {
    "never fenced": ("without fence.proxy.async", FILL + BARRIER + ISSUE + COMMIT + WAIT),
    "fenced before it is written": ("without fence.proxy.async", FENCE + FILL + BARRIER + ISSUE + COMMIT + WAIT),
    "fenced behind the barrier, by the writer": (
        "without fence.proxy.async", FILL + BARRIER + f"@%p3 {FENCE}" + ISSUE + COMMIT + WAIT,
    ),
    "fenced by one of the writers": (
        "without fence.proxy.async", FILL + f"@%p2 {FENCE}" + BARRIER + ISSUE + COMMIT + WAIT,
    ),
    "no barrier": ("shared race", FILL + FENCE + ISSUE + COMMIT + WAIT + BARRIER),
    "not waited for": ("block ends with a TMA store", READY + ISSUE + COMMIT),
    "not committed": ("block ends with a TMA store", READY + ISSUE + WAIT),
    "waited for by another thread": ("block ends with a TMA store", READY + ISSUE + COMMIT + f"@!%p4 {WAIT}"),
    "overwritten": ("over the source of a TMA store", READY + ISSUE + COMMIT + OVERWRITE + WAIT),
    "one group too many in flight": (
        "over the source of a TMA store",
        READY + ISSUE + COMMIT + "cp.async.bulk.wait_group.read 1;" + OVERWRITE + WAIT,
    ),
    "overwritten by others": (
        "over the source of a TMA store", READY + ISSUE + COMMIT + BARRIER + OTHERS_OVERWRITE + BARRIER + WAIT,
    ),
    "overwritten by others, no barrier": (
        "shared race", READY + ISSUE + COMMIT + WAIT_FOR_READ + OTHERS_OVERWRITE,
    ),
    "overwritten by others, a barrier in front of the wait": (
        "shared", READY + ISSUE + COMMIT + BARRIER + WAIT_FOR_READ + OTHERS_OVERWRITE,
    ),
    "read back, not waited for": ("TMA store in flight writes", READY + ISSUE + COMMIT + READ_BACK + WAIT),
    "read back, only its reading waited for": (
        "TMA store in flight writes", READY + ISSUE + COMMIT + WAIT_FOR_READ + READ_BACK,
    ),
    "read back by others, no barrier": (
        "global race in a block", READY + ISSUE + COMMIT + WAIT + OTHERS_READ_BACK,
    ),
    "two stores of the same": ("TMA store in flight writes", READY + (ISSUE + COMMIT) * 2 + WAIT),
    "a reduction on a store": (
        "TMA store in flight writes", READY + ISSUE + COMMIT + reduce("add") + COMMIT + WAIT,
    ),
    "an ordinary write to a reduction": (
        "TMA store in flight writes", READY + reduce("add") + COMMIT + "@%p4 st.global.b32 [%rd2], %r3;" + WAIT,
    ),
    "a reduction that another block reads": (
        "global race between blocks", BLOCK_0 + READY + reduce("add") + COMMIT + WAIT + BLOCK_1 + READ_BACK + "E:",
    ),
    "a source that is not aligned": (
        "not aligned to 128", READY + "add.s32 %r1, %r1, 64;" + ISSUE + COMMIT + WAIT,
    ),
    "a source out of bounds": (
        "TMA outside of shared memory", READY + "add.s32 %r1, %r1, 65408;" + ISSUE + COMMIT + WAIT,
    ),
}  # fmt: skip


def faults(body, order):
    tensor = torch.zeros(16, 16)
    blocks = 2 if BLOCK_1 in body else 1
    return stored(body, tensor, torch.ones(16, 16), (8, 16), order=order, blocks=blocks).faults()


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    for order in ORDERS:
        assert faults(RIGHT[name], order) == []


@pytest.mark.parametrize("name", WRONG)
def test_wrong_in_any_order(name):
    expected, body = WRONG[name]
    for order in ORDERS:
        found = faults(body, order)
        assert any(expected in fault for fault in found), (order, found)
