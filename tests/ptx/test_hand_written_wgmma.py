"""wgmma written by hand: which of its registers need wgmma.fence and wait_group, and how many there are."""

import pytest

from ptx.emulated import needs_compiler
from ptx.hand_written import ORDERS, launched

pytestmark = needs_compiler

# Ones, 16 deep and up to 64 columns wide, in shared memory; its descriptor in %rd1. A of ones in %r10 to %r13.
B = """
mov.b32 %r1, smem; mov.u32 %r3, %tid.x; shl.b32 %r4, %r3, 4; add.s32 %r5, %r1, %r4; mov.b32 %r6, 0x3f803f80;
st.shared.v4.b32 [%r5], {%r6, %r6, %r6, %r6}; fence.proxy.async.shared::cta; bar.sync 0;
shr.u32 %r7, %r1, 4; cvt.u64.u32 %rd2, %r7; add.s64 %rd1, %rd2, 0x1000080000;
mov.b32 %r10, %r6; mov.b32 %r11, %r6; mov.b32 %r12, %r6; mov.b32 %r13, %r6;
"""  # 8 columns are 256 bytes: two pieces along K, 128 bytes apart (leading), the next columns 256 (stride)
A, ZEROS = "{%r10, %r11, %r12, %r13}", "mov.b32 %f0, 0f00000000; mov.b32 %f1, %f0; mov.b32 %f2, %f0; mov.b32 %f3, %f0;"
FENCE, WAIT = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


def product(columns=8, a=A, first=0, sums=1):
    registers = ", ".join(f"%f{first + k}" for k in range(columns // 2))
    return f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{registers}}}, {a}, %rd1, {sums}, 1, 1, 0;"


def expect(*values):
    """Of %f0, %f1, ...; sums of 16 products."""
    return " ".join(f"setp.neu.f32 %p1, %f{k}, 0f{value}; @%p1 trap;" for k, value in enumerate(values))


SIXTEEN, THIRTY_TWO = "41800000", "42000000"
RIGHT = {
    "a product": ZEROS + FENCE + product() + WAIT + expect(*[SIXTEEN] * 4),
    "of the same shape, without a fence": ZEROS + FENCE + product() + product() + WAIT + expect(*[THIRTY_TWO] * 4),
    "of the same shape, waited for between": (
        ZEROS + FENCE + product() + WAIT + product() + WAIT + expect(*[THIRTY_TWO] * 4)
    ),
    "read, fenced": ZEROS + FENCE + product() + WAIT + "mov.b32 %f9, %f0;" + FENCE + product() + WAIT,
    "of another shape, fenced": FENCE + product(16, sums=0) + WAIT + FENCE + product() + WAIT,
    "A read, not fenced": ZEROS + FENCE + product() + WAIT + "mov.b32 %r9, %r10;" + product() + WAIT,
}
WRONG = {
    "never fenced": ("before the first wgmma.fence", ZEROS + product() + WAIT),
    "fenced before it is set": ("accumulator written", FENCE + ZEROS + product() + WAIT),
    "set, but not read": ("accumulator written", FENCE + ZEROS + product(sums=0) + WAIT),
    "set again": ("accumulator written", ZEROS + FENCE + product() + WAIT + "mov.b32 %f2, %f9;" + product() + WAIT),
    "read": ("accumulator read", ZEROS + FENCE + product() + WAIT + "mov.b32 %f9, %f2;" + product() + WAIT),
    "A set": ("A register written", ZEROS + FENCE + "mov.b32 %r12, %r6;" + product() + WAIT),
    "of another shape": ("another shape", FENCE + product(16, sums=0) + WAIT + product() + WAIT),
    "of another shape, in flight": ("in flight of another shape", FENCE + product(16, sums=0) + product() + WAIT),
    "A of an accumulator": (
        "A register that was an accumulator",
        FENCE + product(sums=0) + WAIT + product(a="{%f0, %f1, %f2, %f3}", first=4, sums=0) + WAIT,
    ),
    "an accumulator of A": (
        "another shape", ZEROS + FENCE + product(a="{%f4, %f5, %f6, %f7}") + WAIT + product(first=4, sums=0) + WAIT,
    ),
    "not waited for": ("read of an accumulator", ZEROS + FENCE + product() + expect(SIXTEEN) + WAIT),
    "not committed": (
        "read of an accumulator", ZEROS + FENCE + product() + "wgmma.wait_group.sync.aligned 0;" + expect(SIXTEEN),
    ),
    "A overwritten": ("write to an A register", ZEROS + FENCE + product() + "mov.b32 %r12, 0;" + WAIT),
    "B overwritten": ("over an operand", ZEROS + FENCE + product() + "st.shared.b32 [%r5], %r3;" + WAIT),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    for order in ORDERS:
        assert launched(B + RIGHT[name], threads=128, order=order).faults() == []


@pytest.mark.parametrize("name", WRONG)
def test_wrong_in_any_order(name):
    expected, body = WRONG[name]
    for order in ORDERS:
        faults = launched(B + body, threads=128, order=order).faults()
        assert any(expected in fault for fault in faults), (order, faults)


def test_registers_that_there_are_not():
    body = B + FENCE + product(32, sums=0) + WAIT

    def faults(registers):
        return launched(body, threads=128, bounds=f".reqntid 128\n.maxnreg {registers}").faults()

    assert faults(24) == []
    assert any("more registers in flight" in fault for fault in faults(16))
