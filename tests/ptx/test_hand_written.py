"""What the emulator makes of PTX written by hand: right results of right code, and what is wrong with other code."""

import re
import struct

import pytest
import torch

from ptx.emulated import needs_compiler
from ptx.hand_written import ORDERS, START, by_warps, launched, swizzled_pieces
from ptx.syntax import PtxError, UnknownPtxError
from ptx.tensor_map import SWIZZLES, tensor_map

pytestmark = needs_compiler

# A box of 16 rows is loaded to shared memory and copied out from there as it lies.
LOAD_BOX = """
ld.param.b64 %rd1, [out]; mov.b32 %r9, map; cvt.u64.u32 %rd2, %r9; cvta.param.u64 %rd3, %rd2;
mov.b32 %r1, smem; add.s32 %r2, %r1, 32768; mov.u32 %r3, %tid.x; setp.eq.b32 %p1, %r3, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
fence.proxy.async.shared::cta; bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], BYTES;
mov.b32 %r4, COLUMN; mov.b32 %r5, ROW;
elect.sync %r20|%p2, -1;
@%p2 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd3, {%r4, %r5}], [%r2];
mov.b32 %r6, 0;
W: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r2], %r6;
@!%p3 bra W;
shl.b32 %r7, %r3, 1; add.s32 %r8, %r1, %r7; cvt.u64.u32 %rd4, %r7; add.s64 %rd5, %rd1, %rd4; mov.b32 %r10, 0;
L: ld.shared.b16 %h1, [%r8]; st.global.b16 [%rd5], %h1;
add.s32 %r8, %r8, 64; add.s64 %rd5, %rd5, 64; add.s32 %r10, %r10, 64;
setp.lt.u32 %p4, %r10, BYTES; @%p4 bra L;
"""


@pytest.mark.parametrize("place", [(0, 0), (3, 8), (30, 64), (-3, -5), (39, 71), (100, 100)], ids=str)
@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_boxes_of_tensors(swizzle, place):
    """Zeros outside of the tensor; pieces of 16 bytes exchanged by the row of 128 bytes that they lie in."""
    mode = SWIZZLES[swizzle]
    rows, columns = 16, {0: 64, 1: 16, 2: 32, 3: 64}[mode]
    tensor = torch.arange(1, 40 * 72 + 1, dtype=torch.int16).view(40, 72)
    out = torch.full((rows * columns // 8, 8), -1, dtype=torch.int16)
    box = tensor_map(tensor, tensor.shape, tensor.stride(), (rows, columns), mode)
    body = LOAD_BOX.replace("BYTES", str(out.nbytes)).replace("ROW", str(place[0])).replace("COLUMN", str(place[1]))
    parameters = ".param .u64 out, .param .align 64 .b8 map[128]"
    data = struct.pack("<Q", out.data_ptr()) + bytes(56) + box
    assert launched(body, parameters, data, tensors=[tensor, out]).faults() == []

    expected = torch.zeros(rows, columns, dtype=torch.int16)
    for row in range(rows):
        for column in range(columns):
            y, x = place[0] + row, place[1] + column
            if 0 <= y < 40 and 0 <= x < 72:
                expected[row, column] = tensor[y, x]
    assert torch.equal(out[swizzled_pieces(len(out), mode)].view(rows, columns), expected)


INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r1+1024], 32; bar.sync 0;"
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%r1+1024];"
WAIT = """mov.b32 %r9, 0; W: mbarrier.try_wait.parity.shared::cta.b64 %p5, [%r1+1024], %r9; @!%p5 bra W;"""
STORE, LOAD = "st.shared.b32 [%r7], %r5;", "ld.shared.b32 %r8, [%r7];"


RIGHT = {
    "bar.arrive, bar.sync": by_warps(f"{STORE} bar.arrive 3, 64;", f"bar.sync 3, 64; {LOAD}"),
    "an mbarrier, by parity": INIT + by_warps(STORE + ARRIVE, WAIT + LOAD),
    "an mbarrier, by state": f"""
        @%p1 mbarrier.init.shared::cta.b64 [%r1+1024], 64; bar.sync 0; st.shared.b32 [%r7], 7;
        mbarrier.arrive.shared::cta.b64 %rd1, [%r1+1024];
        W: mbarrier.test_wait.shared::cta.b64 %p5, [%r1+1024], %rd1; @!%p5 bra W; {LOAD}""",
    "a branch table, lanes apart": """
        T: .branchtargets A, B, D; and.b32 %r11, %r3, 1; brx.idx %r11, T;
        A: mov.b32 %r12, 5; bra E; B: mov.b32 %r12, 6; bra E; D: trap;
        E: add.s32 %r13, %r11, 5; setp.ne.b32 %p8, %r12, %r13; @%p8 trap;""",
    "a barrier that nobody is at": "setp.eq.b32 %p9, %r3, 999; @%p9 bar.sync 0;",
}
WRONG = {
    "bar.arrive in front of the store": (
        "shared race", by_warps(f"bar.arrive 3, 64; {STORE}", f"bar.sync 3, 64; {LOAD}"),
    ),
    "a barrier of too many": ("deadlock", "bar.sync 3, 96;"),
    "two barriers": ("deadlock", by_warps("bar.sync 1, 64;", "bar.sync 2, 64;")),
    "a barrier of half a warp": ("by part of a warp", "setp.lt.u32 %p9, %r5, 16; @%p9 bar.sync 0;"),
    "one thread does not arrive": (
        "deadlock", INIT + by_warps(f"setp.ne.b32 %p6, %r5, 4; @%p6 {ARRIVE}", WAIT),
    ),
    "an mbarrier before it is seen": (
        "mbarrier", INIT.replace("bar.sync 0;", "") + by_warps(STORE + ARRIVE, WAIT + LOAD),
    ),
    "a store behind its arrival": ("shared race", INIT + by_warps(ARRIVE + STORE, WAIT + LOAD)),
    "a store over an mbarrier": ("ordinary access", INIT + "@%p1 st.shared.b32 [%r1+1024], 5;"),
    "a branch out of its table": (
        "brx.idx out", "T: .branchtargets A, B; mov.b32 %r11, 2; brx.idx %r11, T; A: bra E; B: bra E; E:",
    ),
    "a loop without an end": ("goes on and on", "L: bra L;"),
    "no barrier": ("shared race", by_warps(STORE, LOAD)),
    "what was never written": ("uninitialised", LOAD),
    "shared memory out of bounds": ("shared load out of bounds", "ld.shared.b32 %r8, [%r1+65536];"),
    "global memory out of bounds": ("global load out of bounds", "mov.b64 %rd1, 4096; ld.global.b32 %r8, [%rd1];"),
    "misaligned": ("misaligned", "ld.shared.b32 %r8, [%r1+2];"),
    "a shuffle from a lane that is not there": (
        "shfl from an inactive lane",
        "setp.lt.u32 %p9, %r5, 16; @!%p9 bra E; shfl.sync.bfly.b32 %r8, %r5, 16, 31, 65535; E:",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    for order in ORDERS:
        assert launched(START + RIGHT[name], threads=64, order=order).faults() == []


@pytest.mark.parametrize("name", WRONG)
def test_wrong_in_any_order(name):
    expected, body = WRONG[name]
    for order in ORDERS:
        faults = launched(START + body, threads=64, order=order).faults()
        assert any(expected in fault for fault in faults), (order, faults)


def test_a_deadlock_says_who_waits_for_what():
    _, body = WRONG["one thread does not arrive"]
    text = launched(START + body, threads=64).failure
    waits = r"warp 1 waits for parity 0 of mbarrier 0x\w+, phase 0, 1 of 32 arrivals and 0 bytes missing"
    assert re.search(waits, text)


BLOCK = {"threads": 256, "bounds": ".reqntid 256\n.maxnreg 128"}
OTHER_GROUP = "shr.u32 %r10, %r4, 2; setp.ne.b32 %p7, %r10, 0; @%p7 bra C;"


@pytest.mark.parametrize("order", ORDERS)
def test_registers_of_warp_groups(order):
    def faults(body):
        return launched(START + body, order=order, **BLOCK).faults()

    more, fewer = "setmaxnreg.inc.sync.aligned.u32 240;", "setmaxnreg.dec.sync.aligned.u32 24;"
    assert faults(f"{OTHER_GROUP} {more} bra E; C: {fewer} E:") == []
    assert any("deadlock" in fault for fault in faults(more))
    uneven = "@%p2 bra C; setmaxnreg.dec.sync.aligned.u32 104; bra E; C: setmaxnreg.dec.sync.aligned.u32 96; E:"
    assert any("disagree" in fault for fault in faults(uneven))


UNKNOWN = ["tanh.approx.bf16 %h1, %h2;", "add.cc.u32 %r1, %r2, %r3;", "mma.sync.aligned.m8n8k4.row.col.f64 x;",
           "cp.reduce.async.bulk.tensor.1d.global.shared::cta.xor.bulk_group [%rd1, {%r1}], [%r2];",
           "cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 16;", "cp.async.bulk.prefetch.L2.global x;",
           "tcgen05.shift.cta_group::1.down [%r1];", "ld.local.b32 %r1, [%r2];", "frobnicate.b32 %r1;"]  # fmt: skip
LOAD_TILE = "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
OF_CLUSTERS = [
    f"{LOAD_TILE}.multicast::cluster [%r1], [%rd1, {{%r2}}], [%r3], %h1;",
    "barrier.cluster.arrive.aligned;",
    "barrier.cluster.wait.aligned;",
    "mapa.shared::cluster.u32 %r1, %r2, 1;",
    "mov.u32 %r1, %cluster_ctarank;",
    "ld.shared::cluster.b32 %r1, [%r2];",
    "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r1], %r2, [%r3];",
    "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r1], [%r2], 16, [%r3];",
    "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r1];",
]


@pytest.mark.parametrize("instruction", UNKNOWN)
def test_unknown_instructions_are_named(instruction):
    with pytest.raises(UnknownPtxError, match=re.escape(re.split(r"[ :]", instruction)[0])):
        launched(instruction)


@pytest.mark.parametrize("instruction", OF_CLUSTERS)
def test_instructions_of_clusters_are_named(instruction):
    with pytest.raises(UnknownPtxError, match="cluster"):
        launched(instruction)


@pytest.mark.parametrize("directive", [".reqnctapercluster 2, 1, 1", ".explicitcluster"])
def test_kernels_of_clusters_are_refused(directive):
    with pytest.raises(UnknownPtxError, match=directive.split()[0]):
        launched("", bounds=directive)


def test_registers_have_types():
    with pytest.raises(PtxError, match="%rd1 is b64, not u32"):
        launched("add.u32 %r1, %rd1, 1;")


def test_parameters_have_sizes():
    with pytest.raises(ValueError, match="4 bytes of parameters, got 5"):
        launched("", data=bytes(5))
