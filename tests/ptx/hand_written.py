"""PTX written by hand: its head and registers, and how it is launched."""

from collections.abc import Sequence

import torch

from .kernel import Buffer, Kernel, Launch, Module

HEAD = ".version 8.6\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 smem[];\n"
REGISTERS = ".reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .b64 %rd<40>; .reg .f32 %f<20>;"
ORDERS = range(7)

START = """
mov.b32 %r1, smem; mov.u32 %r3, %tid.x; shr.u32 %r4, %r3, 5; setp.eq.b32 %p1, %r3, 0; setp.eq.b32 %p2, %r4, 0;
setp.ne.b32 %p3, %r4, 0; and.b32 %r5, %r3, 31; shl.b32 %r6, %r5, 2; add.s32 %r7, %r1, %r6;
"""  # %p1: thread 0; %p2: warp 0; %p3: the other; %r5: lane; %r7: a word of shared memory a lane


def launched(
    body: str,
    parameters: str = ".param .u32 unused",
    data: bytes = bytes(4),
    threads: int = 32,
    order: int = 0,
    bounds: str = "",
    tensors: Sequence[torch.Tensor] = (),
    blocks: int = 1,
) -> Launch:
    """The kernel with this body, which may touch these tensors; ``bounds`` are directives behind its parameters."""
    text = f"{HEAD}.visible .entry k({parameters})\n{bounds}\n{{\n{REGISTERS}\n{body}\nret;\n}}\n"
    buffers = [Buffer(*(t.data_ptr(), t.data_ptr() + t.nbytes) * 2) for t in tensors]
    kernel = Kernel(Module(text), "k")
    return kernel.launch((blocks, 1, 1), (threads, 1, 1), 65536, data, buffers, order=order, limit=1 << 16)


def by_warps(first: str, second: str) -> str:
    """What warp 0 does, and what the others do; behind START."""
    return f"@%p3 bra C; {first} bra E; C: {second} E:"


def swizzled_pieces(count: int, mode: int) -> torch.Tensor:
    """Where pieces of 16 bytes lie in shared memory: they are exchanged by the row of 128 bytes that they lie in."""
    piece = torch.arange(count)
    return piece ^ (piece // 8 & {0: 0, 1: 1, 2: 3, 3: 7}[mode])
