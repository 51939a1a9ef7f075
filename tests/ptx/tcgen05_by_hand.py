"""A product by tcgen05.mma in PTX written by hand, for test_tcgen05.py: operands from shared or tensor memory."""

import re
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch

from .kernel import Buffer, Kernel, Launch, Module

BASE = 1024  # of shared memory: kSharedBase of machine.h
A_AT, B_AT = 1024, 1024 + 32768  # of the operands behind it
REGISTERS = ".reg .pred %p<20>; .reg .b32 %r<99>; .reg .b64 %rd<40>;"
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # as the instruction descriptor numbers them
SWIZZLES = {"none": 0, "128 bytes": 2, "64 bytes": 4, "32 bytes": 6}  # as matrix descriptors number them
ROW_BYTES = {0: 16, 2: 128, 4: 64, 6: 32}


class Product(NamedTuple):
    """What is multiplied, twice into one sum: 32 bytes of each row of A and of B."""

    rows: int = 128
    columns: int = 32
    dtype: torch.dtype = torch.bfloat16
    swizzle: int = SWIZZLES["128 bytes"]
    transpose_a: bool = False
    transpose_b: bool = False
    negate: bool = False
    a_in_tensor_memory: bool = False

    @property
    def depth(self) -> int:
        return 32 // self.dtype.itemsize

    @property
    def shape_bits(self) -> int:
        number = TYPES[self.dtype]
        bits = 1 << 4 | number << 7 | number << 10 | self.negate << 13
        bits |= self.transpose_a << 15 | self.transpose_b << 16
        return bits | self.columns >> 3 << 17 | self.rows >> 4 << 24

    @property
    def kind(self) -> str:
        return "tf32" if self.dtype == torch.float32 else "f16"

    @property
    def lanes(self) -> torch.Tensor:
        """Where the rows of the sum are."""
        row = torch.arange(self.rows)
        return row if self.rows == 128 else row // 16 * 32 + row % 16


def placed(matrix: torch.Tensor, transposed: bool, swizzle: int) -> tuple[torch.Tensor, int, int]:
    """Bytes of a matrix (lines, K) as it lies in shared memory; its descriptor's leading and stride, in bytes.

    Cores are eight rows of one swizzle's width (without swizzling: 16 bytes), which follow each other; those next to
    each other along the other side come behind all of them.
    """
    rows = matrix.t() if transposed else matrix
    size = matrix.element_size()
    width = ROW_BYTES[swizzle]
    height, bytes_across = rows.shape[0], rows.shape[1] * size
    core = 8 * width
    along_rows = core  # to the next eight rows
    along_columns = max(height // 8, 1) * core
    out = torch.zeros(-(-bytes_across // width) * along_columns, dtype=torch.uint8)
    for i, row in enumerate(rows.contiguous().view(torch.uint8).view(height, -1)):
        for piece in range(bytes_across // 16):
            at = i // 8 * along_rows + piece * 16 // width * along_columns + i % 8 * width + piece * 16 % width
            at ^= at >> 3 & (width - 16)
            out[at : at + 16] = row[piece * 16 : piece * 16 + 16]
    # Without swizzling, MN-major has the two the other way round.
    exchanged = transposed and swizzle == 0
    return out, *((along_rows, along_columns) if exchanged else (along_columns, along_rows))


def matrix_descriptor(at: int, leading: int, stride: int, swizzle: int) -> int:
    return at >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | swizzle << 61


START = """
ld.param.b64 %rd1, [a]; ld.param.b64 %rd2, [b]; ld.param.b64 %rd3, [out]; ld.param.b64 %rd4, [packed];
mov.b32 %r1, smem; mov.u32 %r3, %tid.x; shr.u32 %r4, %r3, 5; and.b32 %r5, %r3, 31;
setp.eq.b32 %p1, %r3, 0; setp.eq.b32 %p2, %r4, 0; setp.lt.u32 %p9, %r5, 16;
@%p1 mbarrier.init.shared::cta.b64 [%r1+8], 1;
@%p2 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 128;
@%p2 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
"""
COPY = """
mov.b32 %r10, %r3;
L: shl.b32 %r11, %r10, 2; cvt.u64.u32 %rd5, %r11; add.s32 %r12, %r1, %r11;
setp.lt.u32 %p3, %r11, A_BYTES; setp.lt.u32 %p4, %r11, B_BYTES;
add.s64 %rd6, %rd1, %rd5; @%p3 ld.global.b32 %r13, [%rd6]; @%p3 st.shared.b32 [%r12+A_AT], %r13;
add.s64 %rd6, %rd2, %rd5; @%p4 ld.global.b32 %r13, [%rd6]; @%p4 st.shared.b32 [%r12+B_AT], %r13;
add.s32 %r10, %r10, 128; setp.lt.u32 %p5, %r10, 8192; @%p5 bra L;
"""
MEET = """
fence.proxy.async.shared::cta;
tcgen05.fence::before_thread_sync;
bar.sync 0;
tcgen05.fence::after_thread_sync;
ld.shared.b32 %r6, [%r1];
shl.b32 %r7, %r4, 21; add.s32 %r8, %r6, %r7;
"""  # %r6: address of the memory; %r8: of the warp's lanes
# A row is a lane's: 8 columns of the 32 bytes of its K elements, behind the sum.
STORE_A = {
    128: """
shl.b32 %r11, %r3, 5; cvt.u64.u32 %rd5, %r11; add.s64 %rd6, %rd4, %rd5;
ld.global.v4.b32 {%r40, %r41, %r42, %r43}, [%rd6]; ld.global.v4.b32 {%r44, %r45, %r46, %r47}, [%rd6+16];
tcgen05.st.sync.aligned.32x32b.x8.b32 [%r8+96], {%r40, %r41, %r42, %r43, %r44, %r45, %r46, %r47};
""",
    64: """
and.b32 %r11, %r5, 15; shl.b32 %r12, %r4, 4; add.s32 %r11, %r11, %r12; shl.b32 %r11, %r11, 5;
@!%p9 add.s32 %r11, %r11, 16; cvt.u64.u32 %rd5, %r11; add.s64 %rd6, %rd4, %rd5;
ld.global.v4.b32 {%r40, %r41, %r42, %r43}, [%rd6];
tcgen05.st.sync.aligned.16x32bx2.x4.b32 [%r8+96], 4, {%r40, %r41, %r42, %r43};
""",
}
STORED = """
tcgen05.wait::st.sync.aligned;
tcgen05.fence::before_thread_sync;
bar.sync 0;
tcgen05.fence::after_thread_sync;
"""
MULTIPLY = """
mov.b64 %rd10, A_DESCRIPTOR; mov.b64 %rd11, B_DESCRIPTOR; mov.b32 %r20, SHAPE;
@!%p2 bra W;
elect.sync %r21|%p6, -1;
setp.ne.b32 %p7, %r3, %r3; setp.eq.b32 %p8, %r3, %r3;
@%p6 tcgen05.mma.cta_group::1.kind::KIND [%r6+0], A, %rd11, %r20, %p7;
@%p6 tcgen05.mma.cta_group::1.kind::KIND [%r6+0], A, %rd11, %r20, %p8;
@%p6 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1+8];
"""
WAIT = """
W: mov.b32 %r9, 0;
V: mbarrier.try_wait.parity.shared::cta.b64 %p5, [%r1+8], %r9; @!%p5 bra V;
tcgen05.fence::after_thread_sync;
"""
LOAD = """
mov.b32 %r14, 0;
M: tcgen05.ld.sync.aligned.32x32b.x8.b32 {%r50, %r51, %r52, %r53, %r54, %r55, %r56, %r57}, [%r8+0];
tcgen05.wait::ld.sync.aligned;
mul.lo.s32 %r11, %r3, COLUMN_BYTES; add.s32 %r11, %r11, %r14; cvt.u64.u32 %rd5, %r11; add.s64 %rd6, %rd3, %rd5;
st.global.v4.b32 [%rd6], {%r50, %r51, %r52, %r53}; st.global.v4.b32 [%rd6+16], {%r54, %r55, %r56, %r57};
add.s32 %r8, %r8, 8; add.s32 %r14, %r14, 32; setp.lt.u32 %p5, %r14, COLUMN_BYTES; @%p5 bra M;
"""
END = """
tcgen05.fence::before_thread_sync;
bar.sync 0;
tcgen05.fence::after_thread_sync;
@%p2 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r6, 128;
"""


def multiplied(
    product: Product, order: int = 0, edit: Callable[[str], str] = str
) -> tuple[torch.Tensor, torch.Tensor, Launch]:
    """The lanes of tensor memory that the kernel, perhaps edited, brings back; what they should be; how it went."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(product.rows, product.depth, generator=generator).to(product.dtype)
    b = torch.randn(product.columns, product.depth, generator=generator).to(product.dtype)
    a_bytes, a_leading, a_stride = placed(a, product.transpose_a, product.swizzle)
    b_bytes, b_leading, b_stride = placed(b, product.transpose_b, product.swizzle)
    out = torch.full((128, product.columns), torch.nan)
    text = START + COPY + MEET
    if product.a_in_tensor_memory:
        text += STORE_A[product.rows] + STORED
    text += MULTIPLY.replace(" A,", " [%r6+96]," if product.a_in_tensor_memory else " %rd10,") + WAIT + LOAD + END
    values = {
        "A_DESCRIPTOR": matrix_descriptor(BASE + A_AT, a_leading, a_stride, product.swizzle),
        "B_DESCRIPTOR": matrix_descriptor(BASE + B_AT, b_leading, b_stride, product.swizzle),
        "A_BYTES": len(a_bytes), "B_BYTES": len(b_bytes), "A_AT": A_AT, "B_AT": B_AT,
        "SHAPE": product.shape_bits, "KIND": product.kind, "COLUMN_BYTES": 4 * product.columns,
    }  # fmt: skip
    text = re.sub("|".join(values), lambda match: str(values[match[0]]), edit(text))
    result = launched(text, [a_bytes, b_bytes, out, a], order)
    sum_ = 2 * _tf32(a).double() @ _tf32(b).double().t() * (-1 if product.negate else 1)
    expected = torch.full_like(out, torch.nan)
    expected[product.lanes] = sum_.float()
    return out, expected, result


def _tf32(x: torch.Tensor) -> torch.Tensor:
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x


def launched(body: str, tensors: list[torch.Tensor], order: int = 0) -> Launch:
    """One block of 128 threads; the parameters are the addresses of four tensors."""
    head = ".version 9.0\n.target sm_100a\n.address_size 64\n.extern .shared .align 16 .b8 smem[];\n"
    names = "a", "b", "out", "packed"
    parameters = ", ".join(f".param .u64 {name}" for name in names)
    text = f"{head}.visible .entry k({parameters})\n{{\n{REGISTERS}\n{body}\nret;\n}}\n"
    buffers = [Buffer(*(t.data_ptr(), t.data_ptr() + t.nbytes) * 2) for t in tensors]
    data = struct.pack("<4Q", *(t.data_ptr() for t in tensors))
    return Kernel(Module(text), "k").launch((1, 1, 1), (128, 1, 1), 66560, data, buffers, order=order, limit=1 << 16)
