"""What the emulator makes of tcgen05 written by hand: right products of right code, what is wrong with other code."""

import re

import pytest
import torch

from ptx.emulated import needs_compiler
from ptx.syntax import UnknownPtxError
from ptx.tcgen05_by_hand import END, LOAD, MEET, START, STORED, SWIZZLES, WAIT, Product, launched, multiplied

pytestmark = needs_compiler

ORDERS = range(7)
PRODUCTS = {
    **{f"swizzled by {name}": Product(swizzle=mode) for name, mode in SWIZZLES.items()},
    **{
        f"transposed, swizzled by {name}": Product(swizzle=mode, transpose_a=True, transpose_b=True)
        for name, mode in SWIZZLES.items()
    },
    "A transposed": Product(transpose_a=True, columns=96),
    "B transposed": Product(transpose_b=True, columns=96, swizzle=SWIZZLES["64 bytes"]),
    "float16": Product(dtype=torch.float16),
    "tf32": Product(dtype=torch.float32),
    "tf32, 64 rows": Product(64, 24, torch.float32, SWIZZLES["32 bytes"]),
    "negated": Product(negate=True),
    "64 rows": Product(64, 24),
    "64 rows of A transposed": Product(64, 24, transpose_a=True),
    "A in tensor memory": Product(a_in_tensor_memory=True),
    "A of tf32 in tensor memory": Product(dtype=torch.float32, a_in_tensor_memory=True),
    "64 rows of A in tensor memory": Product(64, 40, torch.float16, a_in_tensor_memory=True),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    product = PRODUCTS[name]
    out, expected, result = multiplied(product)
    assert result.faults() == []
    assert result.counts["TCGEN05_MMA_FLOP"] == 2 * 2 * product.rows * product.columns * product.depth
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("order", ORDERS)
def test_products_in_any_order(order):
    out, expected, result = multiplied(PRODUCTS["A in tensor memory"], order)
    assert result.faults() == []
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_moves_of_every_shape():
    """What is stored by one shape is loaded by it, and by 32x32b as it lies there."""
    # Where register r of thread t is: lane and column.
    shapes = {
        "16x64b.x4": (4, 8, lambda t, r: (t // 4 + t % 2 * 8, t // 2 % 2 + 2 * r)),
        "16x128b.x2": (4, 8, lambda t, r: (t // 4 + r % 2 * 8, t % 4 + r // 2 * 4)),
        "16x256b.x1": (4, 8, lambda t, r: (t // 4 + r // 2 % 2 * 8, t % 4 * 2 + r % 2)),
        "16x32bx2.x4": (4, 8, lambda t, r: (t % 16, r + t // 16 * 4)),
        "32x32b.x8": (8, 8, lambda t, r: (t, r)),
    }
    for shape, (registers, columns, place) in shapes.items():
        split = " 4," * shape.startswith("16x32bx2")
        values = "; ".join(f"shl.b32 %r{40 + r}, %r3, 4; or.b32 %r{40 + r}, %r{40 + r}, {r}" for r in range(registers))
        names = ", ".join(f"%r{40 + r}" for r in range(registers))
        back = ", ".join(f"%r{70 + r}" for r in range(registers))
        checks = "".join(
            f"setp.ne.b32 %p6, %r{40 + r}, %r{70 + r}; @%p6 trap;\n" for r in range(registers)
        )  # fmt: skip
        body = f"""{START} {MEET} {values};
            tcgen05.st.sync.aligned.{shape}.b32 [%r8],{split} {{{names}}};
            tcgen05.wait::st.sync.aligned;
            tcgen05.ld.sync.aligned.{shape}.b32 {{{back}}}, [%r8]{split.rstrip(",").replace(" 4", ", 4")};
            tcgen05.wait::ld.sync.aligned; {checks} {LOAD.replace("COLUMN_BYTES", str(4 * columns))} {END}"""
        out = torch.full((128, columns), -1, dtype=torch.int32)
        assert launched(body, [out, out, out, out]).faults() == [], shape
        expected = torch.full_like(out, -1)
        for thread in range(128):
            for r in range(registers):
                lane, column = place(thread % 32, r)
                expected[thread // 32 * 32 + lane, column] = thread << 4 | r
        assert torch.equal(out, expected), shape


def without(text, count=1):
    return instead(text, "", count)


def in_front(text, more):
    return instead(text, f"{more} {text}")


def instead(text, other, count=1):
    """An edit; of the first so many occurrences, or the last."""

    def edit(body):
        assert text in body, text
        return other.join(body.rsplit(text, -count)) if count < 0 else body.replace(text, other, count)

    return edit


FENCE_BEFORE, FENCE_AFTER = "tcgen05.fence::before_thread_sync;", "tcgen05.fence::after_thread_sync;"
ALLOC = "@%p2 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 128;"
DEALLOC = "@%p2 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r6, 128;"
COMMIT = "@%p6 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1+8];"
SHARED = Product()
FROM_TENSOR = Product(a_in_tensor_memory=True)
AGAIN = "@%p6 tcgen05.mma.cta_group::1.kind::KIND [%r6+0], %rd10, %rd11, %r20, %p8;"
BY_WARP_3 = "setp.ne.b32 %p10, %r4, 3; @%p10 bra U; st.shared.b32 [%r1+A_AT], 7; U:"
SLEEP = """mov.b32 %r15, 0;
N: nanosleep.u32 100; add.s32 %r15, %r15, 1; setp.lt.u32 %p11, %r15, 6000; @%p11 bra N;"""  # until any product is over
OVER_A = "@%p1 st.shared.b32 [%r1+A_AT], %r3;"
OVER_SUM = """tcgen05.st.sync.aligned.32x32b.x1.b32 [%r8+0], {%r3}; tcgen05.wait::st.sync.aligned;"""
WRONG = {
    "too few columns": ("power of two", SHARED, instead("[%r1], 128", "[%r1], 16")),
    "columns that are no power of two": ("power of two", SHARED, instead("[%r1], 128", "[%r1], 96")),
    "more columns than there are": ("would wait for columns", SHARED, instead(ALLOC, ALLOC.replace("128", "512") * 2)),
    "not deallocated": ("without tcgen05.dealloc", SHARED, without(DEALLOC)),
    "another size deallocated": ("was not allocated", SHARED, instead(DEALLOC, DEALLOC.replace("128", "64"))),
    "deallocated while others load": ("tensor memory", SHARED, without("bar.sync 0;", -1)),
    "allocated without permission": (
        "after tcgen05.relinquish_alloc_permit", SHARED, instead(MEET, MEET + ALLOC + DEALLOC.replace("%r6", "256")),
    ),
    "nothing allocated": ("none was ever allocated", SHARED, without(ALLOC)),
    "columns of nobody": ("not allocated", SHARED, instead("[%r8+0]", "[%r8+128]")),
    "a sum of nobody's columns": ("not allocated", SHARED, instead("[%r6+0]", "[%r6+100]", 2)),
    "another warp's lanes": ("quarter of lanes", SHARED, without("add.s32 %r8, %r6, %r7;")),
    "added to what was never written": ("never written", SHARED, instead("%r20, %p7;", "%r20, %p8;")),
    "A that was never written": ("never written", SHARED, instead("%rd10, %rd11", "[%r6+64], %rd11", 2)),
    "a load by half a warp": ("part of a warp", SHARED, instead("M: tcgen05", "M: @%p9 tcgen05")),
    "not committed": ("was not committed", SHARED, instead(COMMIT, "@%p6 mbarrier.arrive.shared::cta.b64 _, [%r1+8];")),
    "neither committed nor arrived": ("deadlock", SHARED, without(COMMIT)),
    "committed by another thread": (
        "was not committed", SHARED, in_front(COMMIT, "setp.eq.b32 %p6, %r5, 1;"),
    ),
    "committed too early": (
        "was not committed", SHARED, lambda text: in_front("setp.ne.b32 %p7", COMMIT)(without(COMMIT)(text)),
    ),
    "the product is not waited for": ("mma", SHARED, without("@!%p5 bra V;")),
    "multiplied by a whole warp": ("more than one thread", SHARED, instead("@%p6 tcgen05.mma", "tcgen05.mma")),
    "operands not fenced": ("without fence.proxy.async", SHARED, without("fence.proxy.async.shared::cta;")),
    "operands not waited for": ("shared", SHARED, without("bar.sync 0;")),
    "no fence in front of the load": ("tensor memory race", SHARED, instead(WAIT, WAIT.replace(FENCE_AFTER, ""))),
    "no fence behind the store": ("race", FROM_TENSOR, instead(STORED, STORED.replace(FENCE_BEFORE, ""))),
    "no fence in front of the product": ("race", FROM_TENSOR, instead(STORED, STORED.replace(FENCE_AFTER, ""))),
    "stores not waited for": ("before tcgen05.wait::st", FROM_TENSOR, without("tcgen05.wait::st.sync.aligned;")),
    "no barrier behind the stores": ("tensor memory", FROM_TENSOR, instead(STORED, STORED.replace("bar.sync 0;", ""))),
    "loads not waited for": ("no tcgen05.wait::ld", SHARED, without("tcgen05.wait::ld.sync.aligned;")),
    "an operand overwritten": ("over an operand of", SHARED, in_front("mov.b32 %r9", OVER_A)),
    "an operand overwritten by a warp that does not wait": ("shared", SHARED, in_front("mov.b32 %r9", BY_WARP_3)),
    "an operand overwritten later by a warp that does not wait": (
        "mbarrier was not waited for", SHARED, in_front("mov.b32 %r9", BY_WARP_3.replace("bra U;", f"bra U; {SLEEP}")),
    ),
    "an operand in tensor memory overwritten": (
        "operand of a tcgen05.mma", FROM_TENSOR, in_front("mov.b32 %r9", OVER_SUM.replace("+0", "+96")),
    ),
    "the sum overwritten": ("sum of a tcgen05.mma", SHARED, in_front("mov.b32 %r9", OVER_SUM)),
    "a sum in flight multiplied": (
        "sum of a tcgen05.mma", SHARED,
        in_front(COMMIT, AGAIN.replace("[%r6+0], %rd10", "[%r6+64], [%r6+0]").replace("%p8", "%p7")),
    ),
    "another shape added to a sum in flight": (
        "sum of a tcgen05.mma", SHARED,
        in_front(COMMIT, f"xor.b32 %r20, %r20, 786432; {AGAIN}"),
    ),
    "addresses that differ": ("addresses differ", SHARED, in_front("M: ", "add.s32 %r8, %r8, %r5;")),
    "a sparse product": ("sparse", SHARED, instead("SHAPE;", "SHAPE; or.b32 %r20, %r20, 4;")),
    "sums of float16": ("not float32", SHARED, instead("SHAPE;", "SHAPE; xor.b32 %r20, %r20, 16;")),
    "another kind": ("not those of its kind", SHARED, instead("KIND", "tf32", 2)),
    "96 rows": ("M must be", SHARED, instead("SHAPE;", "SHAPE; sub.s32 %r20, %r20, 33554432;")),
    "a descriptor for wgmma": (
        "wrong or not known", SHARED, in_front("mov.b32 %r20", "sub.s64 %rd11, %rd11, 70368744177664;"),
    ),
    "an unknown swizzle": (
        "wrong or not known", SHARED, in_front("mov.b32 %r20", "add.s64 %rd11, %rd11, 2305843009213693952;"),
    ),
    "operands out of bounds": ("out of bounds", SHARED, in_front("mov.b32 %r20", "add.s64 %rd11, %rd11, 4000;")),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_in_any_order(name):
    expected, product, edit = WRONG[name]
    for order in ORDERS:
        faults = multiplied(product, order, edit)[2].faults()
        assert any(expected in fault for fault in faults), (order, faults)


NO_FENCES = re.compile(r"tcgen05\.fence::\w+;")


@pytest.mark.parametrize("order", ORDERS)
def test_without_any_fence_waits_are_enough(order):
    """As Triton has it; what the fences are for is still looked at."""

    def edit(text):
        return NO_FENCES.sub("", text)

    out, expected, result = multiplied(FROM_TENSOR, order, edit)
    assert result.faults() == []
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for text, fault in {
        "tcgen05.wait::ld.sync.aligned;": "written before tcgen05.wait::ld",
        "tcgen05.wait::st.sync.aligned;": "before tcgen05.wait::st",
        "@!%p5 bra V;": "mma",
    }.items():
        faults = multiplied(FROM_TENSOR, order, lambda body, text=text: edit(without(text)(body)))[2].faults()
        assert any(fault in each for each in faults), (text, faults)


def test_tensor_memory_holds_nan_until_it_is_written():
    out, _, result = multiplied(SHARED, edit=instead("[%r8+0]", "[%r8+64]"))
    assert out.isnan().all()
    assert [found.kind for found in result.findings] == ["read of tensor memory that was never written"]


WRONG_NUMBERS = {
    "not added to": instead("%r20, %p8;", "%r20, %p7;"),
    "float16 for bfloat16": instead("SHAPE;", "SHAPE; xor.b32 %r20, %r20, 1152;"),
    "transposed": instead("SHAPE;", "SHAPE; xor.b32 %r20, %r20, 32768;"),
    "negated": instead("SHAPE;", "SHAPE; xor.b32 %r20, %r20, 16384;"),
    "another swizzle": in_front("mov.b32 %r20", "xor.b64 %rd11, %rd11, -4611686018427387904;"),
    "another stride": in_front("mov.b32 %r20", "add.s64 %rd11, %rd11, 34359738368;"),
    "matrices exchanged": instead("%rd10, %rd11", "%rd11, %rd10", 2),
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_wrong_numbers(name):
    out, expected, result = multiplied(SHARED, edit=WRONG_NUMBERS[name])
    assert result.faults() or not torch.allclose(out, expected, rtol=1e-3, atol=1e-3)


UNKNOWN = [
    "tcgen05.cp.cta_group::1.128x256b [%r1], %rd1;", "tcgen05.shift.cta_group::1.down [%r1];",
    "tcgen05.mma.cta_group::2.kind::f16 [%r1], %rd1, %rd2, %r2, %p1;",
    "tcgen05.mma.cta_group::1.kind::i8 [%r1], %rd1, %rd2, %r2, %p1;",
    "tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, %p1, 3;",
    "tcgen05.mma.ws.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, %p1;",
    "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%r1], %r2;",
    "tcgen05.ld.sync.aligned.32x32b.x1.pack::16b.b32 {%r1}, [%r2];", "max.f32 %r1, %r2, %r3, %r4, %r5;",
]  # fmt: skip


@pytest.mark.parametrize("instruction", UNKNOWN)
def test_unknown_instructions_are_named(instruction):
    with pytest.raises(UnknownPtxError, match=re.escape(instruction.split()[0])):
        launched(instruction, [torch.zeros(1)] * 4)
