"""What the kernels in Gluon share: rings of blocks that TMA fills, rows and masks as in ``triton_tiles``.

A ring has STAGES places in shared memory. A producer warp fills one when it is empty, consumers wait until it is full:

    producer    wait(empty) · expect(full, bytes) · TMA ┄┄> full
    consumers                                               wait(full) · products · arrive(empty)

Both mbarriers of a place turn once for each use of it: use i is of place i % STAGES, in phase i // STAGES & 1. Waiting
for the phase before the first returns at once: places are empty when the kernel begins.

A block [N, D] of bf16 lies in shared memory as D / 64 panels of N rows of 128 bytes, swizzled within groups of 8 rows:
what the TMA unit writes and wgmma reads. So 8 · n rows of a panel are memory of their own, where a box can go.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# See triton_tiles.
LOWEST = gl.constexpr(-1e30)
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)

# Columns of a panel.
PANEL = gl.constexpr(64)

_REINTERPRET_IS_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # since Triton 3.9


def tensor_map(tensor: Tensor, box: list[int]) -> TensorDescriptor:
    """By which TMA reads boxes [..., n, D] of a tensor, with zeros beyond it; ``gluon_launch`` says of which ones."""
    layout = gl.NVMMASharedLayout(128, 8 * tensor.element_size(), rank=len(box))
    # That of a dimension of size 1 may be anything, and the driver would refuse it.
    strides = [stride if size > 1 else 8 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], box, layout)


@gluon.jit
def reinterpreted(shared, shape: gl.constexpr, layout: gl.constexpr):
    """Shared memory as of another shape and layout."""
    if _REINTERPRET_IS_PUBLIC:
        return shared.reinterpret(shared.dtype, shape, layout)
    else:
        return shared._reinterpret(shared.dtype, shape, layout)


@gluon.jit
def allocate_ring(dtype: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
                  CONSUMERS: gl.constexpr):  # fmt: skip
    """Blocks [STAGES, ROWS, COLUMNS], and the mbarriers of full and of empty places."""
    blocks = gl.allocate_shared_memory(dtype, [STAGES, ROWS, COLUMNS], gl.NVMMASharedLayout(128, 16, rank=2))
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    return blocks, full, empty


@gluon.jit
def wait_full(ring, i, STAGES: gl.constexpr):
    """The block of use ``i``, as soon as it is there."""
    blocks, full, _ = ring
    mbarrier.wait(full.index(i % STAGES), i // STAGES & 1)
    return blocks.index(i % STAGES)


@gluon.jit
def release(ring, i, STAGES: gl.constexpr):
    """This group of consumers has done with use ``i``."""
    _, _, empty = ring
    mbarrier.arrive(empty.index(i % STAGES), count=1)


@gluon.jit
def begin_fill(ring, i, size, STAGES: gl.constexpr):
    """Wait until the place of use ``i`` is empty and expect ``size`` bytes there: the place, and what to tell TMA."""
    blocks, full, empty = ring
    mbarrier.wait(empty.index(i % STAGES), i // STAGES & 1 ^ 1)
    mbarrier.expect(full.index(i % STAGES), size)
    return blocks.index(i % STAGES), full.index(i % STAGES)


@gluon.jit
def as_column(vector, like):
    """[rows] -> [rows, 1], to go with a matrix ``like`` that one."""
    return gl.expand_dims(gl.convert_layout(vector, gl.SliceLayout(1, like.type.layout)), 1)


@gluon.jit
def original_of(position, order):
    """See triton_tiles; int32."""
    if order is None:
        return position
    else:
        return gl.load(order + position).to(gl.int32)


@gluon.jit
def rows_of(
    index, anchors, thought_lengths, num_rows, length, thought_steps, STEPS: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """What packed rows belong to, pointers being those of their batch.

    Returns:
        position: of their anchors in the kernel's order.
        step: 0..T−1.
        own: how many steps of the thought exist.
        anchor: the last base key; −1 for rows that do not exist.
    """
    rows = gl.minimum(index, num_rows - 1)  # a tile's surplus rows repeat the last one and are not stored
    position = rows // (STEPS * GROUP)
    step = rows // GROUP % STEPS + (thought_steps - STEPS)
    anchor = position
    if anchors is not None:
        anchor = gl.minimum(gl.load(anchors + position), length - 1).to(gl.int32)
    own = thought_steps + 0 * step
    if thought_lengths is not None:
        own = gl.load(thought_lengths + position).to(gl.int32)
        anchor = gl.where(step < own, anchor, -1)
    return position, step, own, anchor


@gluon.jit
def first_keys(position, step, anchor, key_start, window, step_window, PER_ANCHOR: gl.constexpr):
    """The first base keys of rows, where there is one of the three that make it another than 0."""
    first = 0 * position
    if key_start is not None:
        if PER_ANCHOR:
            first = gl.load(key_start + position).to(gl.int32)
        else:
            first += gl.load(key_start).to(gl.int32)
    if window is not None:
        first = gl.maximum(first, anchor - (window - 1))
    if step_window is not None:
        first = gl.maximum(first, anchor + step + (2 - step_window))
    return first


@gluon.jit
def base_blocks(anchor, first, length, BLOCK_N: gl.constexpr):
    """Which blocks of base keys the rows of a tile look at: at least one, a masked one first.

        begin      low_end      full_end     end
          │ masked ┤   full       ├  masked   │     blocks of BLOCK_N keys, each kind from the last to the first
                                  └ high ─────┘

    Returns:
        end, high, low_end, masked, full_end, blocks: the numbers above, and how many are ``masked``, and how many
        there are. ``block_of`` has their order.
    """
    highest = gl.max(anchor, 0)
    lowest = gl.minimum(gl.min(gl.where(anchor < 0, length, anchor), 0), highest)
    end = (highest + BLOCK_N) // BLOCK_N
    begin = 0
    full_begin = 0
    if first is not None:
        begin = gl.minimum(gl.min(gl.where(first <= anchor, first, length), 0) // BLOCK_N, end)
        full_begin = (gl.max(gl.where(anchor < 0, 0, first), 0) + BLOCK_N - 1) // BLOCK_N
        full_begin = gl.minimum(gl.maximum(full_begin, begin), end)
    full_end = gl.maximum((lowest + 1) // BLOCK_N, full_begin)
    high = end - full_end
    masked = high + full_begin - begin
    if masked == 0:  # a full one, or none at all: then one of which nothing is seen
        high = 1
        masked = 1
        full_end = gl.maximum(full_end - 1, full_begin)
    return end, high, full_begin, masked, full_end, masked + full_end - full_begin


@gluon.jit
def block_of(i, bounds):
    """The i-th block of base keys that a tile takes."""
    end, high, low_end, masked, full_end, _ = bounds
    block = gl.where(i < high, end - 1 - i, low_end - 1 - (i - high))
    return gl.where(i < masked, block, full_end - 1 - (i - masked))


@gluon.jit
def tanh(x):
    """See triton_tiles."""
    square = x * x
    series = -0.3333277 + square * (0.13315259 + square * (-0.05230258 + square * 0.015739441))
    size = gl.abs(x)
    far = 1 - 2 / (gl.exp2(size * (2 * LOG2_E)) + 1)
    return gl.where(size < 0.55, x + x * square * series, gl.where(x < 0, -far, far))


@gluon.jit
def curved(products, curve_scale):
    """See triton_tiles."""
    if curve_scale is None:
        return products
    else:
        return tanh(products * curve_scale)


@gluon.constexpr_function
def row_layout(columns):
    """For four warps to read or write rows of half precision: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def gather_rows(
    q, query, order, stride, begin, num_rows, STEPS: gl.constexpr, GROUP: gl.constexpr, HEAD: gl.constexpr
):  # fmt: skip
    """Read the rows from ``begin`` on, zero-padded to the columns of ``q`` in shared memory."""
    LAYOUT: gl.constexpr = row_layout(q.shape[1])
    rows = gl.minimum(begin + gl.arange(0, q.shape[0], gl.SliceLayout(1, LAYOUT)), num_rows - 1)
    original = original_of(rows // (STEPS * GROUP), order)
    offsets = row_offsets(rows, original, stride, STEPS, GROUP)
    column = gl.expand_dims(gl.arange(0, q.shape[1], gl.SliceLayout(0, LAYOUT)), 0)
    pointers = query + gl.expand_dims(offsets, 1) + column
    if q.shape[1] == HEAD:
        q.store(gl.load(pointers))
    else:
        q.store(gl.load(pointers, mask=column < HEAD, other=0.0))


@gluon.jit
def store_rows(output, result, result_rows, VALUE_HEAD: gl.constexpr):
    """Store ``result`` as ``result_rows``, both in shared memory: whole ones, 16 bytes a thread."""
    LAYOUT: gl.constexpr = row_layout(result.shape[1])
    row = gl.expand_dims(result_rows.load(gl.SliceLayout(1, LAYOUT)), 1)
    column = gl.expand_dims(gl.arange(0, result.shape[1], gl.SliceLayout(0, LAYOUT)), 0)
    wanted = row >= 0
    if result.shape[1] != VALUE_HEAD:
        wanted = wanted & (column < VALUE_HEAD)
    gl.store(output + (row * VALUE_HEAD + column), result.load(LAYOUT), mask=wanted)


@gluon.jit
def row_offsets(rows, original, stride, STEPS: gl.constexpr, GROUP: gl.constexpr):
    """See triton_tiles."""
    step = rows // GROUP % STEPS
    return original.to(gl.int64) * stride[2] + step.to(gl.int64) * stride[3] + (rows % GROUP).to(gl.int64) * stride[1]
