"""Keys and values that a tile sees in part, brought to shared memory by copies that leave out what no row sees.

For kernels in Gluon whose groups of four warps have HALF packed rows each: base keys at the edges of what they see, in
blocks of EDGE_N, and the thought keys of their block diagonal. The TMA unit brings the others (``gluon_pipeline``).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from quietstar.ops.thought_attention.triton_tiles import (
    anchor_of,
    first_of_step,
    original_of,
    readable,
    sees_block,
    start_of,
)

HALF = gl.constexpr(64)
"""Rows of a group: those of one wgmma."""
EDGE_N = gl.constexpr(32)
"""Base keys of a block, at the most."""


@gluon.jit
def again(index):
    """``index``, which the compiler does not know to be the same: it would keep what it has made of it in registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [index], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def first_of(position, batch, key_start, num_anchors, PER_ANCHOR: gl.constexpr):
    """``start_of``, of which the constant has no layout here."""
    if key_start is None:
        return gl.to_tensor(0)
    else:
        return start_of(position, batch, key_start, num_anchors, PER_ANCHOR)


@gluon.jit
def length_at(position, thought_lengths):
    """The thought lengths of the anchors at ``position``."""
    if thought_lengths is None:
        return None
    else:
        return gl.load(thought_lengths + position).to(gl.int32)


@gluon.jit
def pointers_to(pointer, offsets, HEAD: gl.constexpr, BLOCK_D: gl.constexpr, LAYOUT: gl.constexpr):
    """Pointers to the vectors of HEAD elements at ``offsets``, and which of their BLOCK_D columns there are."""
    column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LAYOUT))[None, :]
    return (pointer + offsets)[:, None] + column, column < HEAD


@gluon.jit
def start_copy(tile, pointer, offsets, seen, HEAD: gl.constexpr, BLOCK_D: gl.constexpr, LAYOUT: gl.constexpr):
    """Start to copy vectors to shared memory, zeros where they are not ``seen``."""
    pointers, columns = pointers_to(pointer, offsets, HEAD, BLOCK_D, LAYOUT)
    if seen is not None:
        columns = columns & seen[:, None]
    # ``gluon_launch`` has seen to it that vectors begin at multiples of 16 bytes: less than that is not copied.
    async_copy.async_load(tile, gl.multiple_of(pointers, (1, 16)), columns)


@gluon.jit
def end_copies():
    """Of all threads of a group; wgmma may read what came."""
    async_copy.wait_group(0)
    fence_async_shared()
    gl.barrier()


@gluon.jit
def edge_block(i, bounds):
    """Where the i-th block of base keys at the edges begins; ``bounds`` as ``base_range`` of triton_tiles has them."""
    begin, _, _, hole_at, hole = bounds
    return begin + i * EDGE_N + gl.where(i < hole_at, 0, hole)


@gluon.jit
def start_edge(
    block, tiles, base, start, place, mask, end, STEPS: gl.constexpr, GROUP: gl.constexpr, HEAD: gl.constexpr,
    VALUE_HEAD: gl.constexpr, BLOCK_D: gl.constexpr, PER_ANCHOR: gl.constexpr, GROUP_ANCHORS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Start to copy the base keys and values from ``block`` on that some row of the group sees."""
    key, value, key_stride, value_stride = base
    num_rows, num_anchors, length, thought_steps, batch = place
    anchors, _, _, key_start, window, step_window = mask
    ROWS: gl.constexpr = STEPS * GROUP
    index = again(gl.arange(0, EDGE_N, gl.SliceLayout(1, LAYOUT)))
    if window is None and step_window is None and not PER_ANCHOR:
        first = first_of(0, batch, key_start, num_anchors, PER_ANCHOR)
        seen = (block + index < end) & (block + index >= first)
    else:
        PAIRS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0])
        position = start // ROWS + gl.arange(0, GROUP_ANCHORS, gl.SliceLayout(1, PAIRS))
        position = gl.minimum(position, (gl.minimum(start + HALF, num_rows) - 1) // ROWS)
        anchor = anchor_of(position, anchors, length).to(gl.int32)
        first = first_of(position, batch, key_start, num_anchors, PER_ANCHOR)
        first = first_of_step(first, anchor, thought_steps - STEPS, step_window)
        keys = block + gl.arange(0, EDGE_N, gl.SliceLayout(0, PAIRS))
        some = sees_block(anchor, keys, first, window) & (keys < end)[None, :]
        seen = gl.convert_layout(gl.max(some.to(gl.int32), 0), gl.SliceLayout(1, LAYOUT)) > 0
    wide = block.to(gl.int64)
    start_copy(tiles[0], key, wide * key_stride[2] + index * key_stride[2], seen, HEAD, BLOCK_D, LAYOUT)
    start_copy(tiles[1], value, wide * value_stride[2] + index * value_stride[2], seen, VALUE_HEAD, BLOCK_D, LAYOUT)
    async_copy.commit_group()


@gluon.jit
def thought_columns(column, start, place, mask, ROWS: gl.constexpr):
    """Position of the anchor, and step, of the thought keys in these columns of a group's block diagonal.

    And the position of the anchor to read them of: what inactive ones have may be NaN, that of the group's last one
    comes in its place.
    """
    num_rows, num_anchors, _, thought_steps, _ = place
    anchors = mask[0]
    position = start // ROWS + column // thought_steps
    near = gl.minimum(position, num_anchors - 1)
    if anchors is not None:
        last = (gl.minimum(start + HALF, num_rows) - 1) // ROWS
        near = gl.where(gl.load(anchors + near) < 0, last, near)
    return position, column % thought_steps, near


@gluon.jit
def start_thoughts(
    chunk, tiles, thoughts, start, place, mask, STEPS: gl.constexpr, GROUP: gl.constexpr, HEAD: gl.constexpr,
    VALUE_HEAD: gl.constexpr, BLOCK_D: gl.constexpr, DIAGONAL_N: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Start to copy the thought keys and values from column ``chunk`` on."""
    key, value, key_stride, value_stride = thoughts
    thought_steps = place[3]
    _, order, thought_lengths, _, _, step_window = mask
    column = chunk + gl.arange(0, DIAGONAL_N, gl.SliceLayout(1, LAYOUT))
    _, step, near = thought_columns(column, start, place, mask, STEPS * GROUP)
    step = readable(step, length_at(near, thought_lengths), step_window, thought_steps, STEPS).to(gl.int64)
    original = original_of(near, order).to(gl.int64)
    key_offsets = original * key_stride[2] + step * key_stride[3]
    value_offsets = original * value_stride[2] + step * value_stride[3]
    start_copy(tiles[0], key, key_offsets, None, HEAD, BLOCK_D, LAYOUT)
    start_copy(tiles[1], value, value_offsets, None, VALUE_HEAD, BLOCK_D, LAYOUT)
    async_copy.commit_group()
