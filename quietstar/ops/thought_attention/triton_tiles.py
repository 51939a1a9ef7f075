"""Shared parts of the thought attention kernels: the packing of rows in tiles, the keys they see, and loads of both.

The S·G query rows of an anchor (S steps, G heads that share one key/value head) are adjacent: row r of one key/value
head belongs to head r % G of step (r // G) % S of anchor r // (G·S). Rows are cut into tiles without regard to anchors,
so that no tile row is wasted. Anchors are sorted, so that the rows of a tile end at nearly the same base key:

             base keys 0 … L                          thought keys of the tile's anchors
    row 0    ████████████████████████                 █
    .        ████████████████████████                 ██
    .        ████████████████████████                 ███
    .        █████████████████████████                   █
    .        █████████████████████████                   ██
    row M    █████████████████████████                   ███
             └ full blocks ──────┘└ masked            └ block diagonal, see DIAGONAL_M

Thought keys form a block diagonal: a row sees at most T of them. A tile is divided into DIAGONALS parts of DIAGONAL_M
rows. Each part is multiplied only by the thought keys of its own few anchors (at most DIAGONAL_ANCHORS, DIAGONAL_N keys
at a time), and a batched dot computes all parts at once. Small parts waste little if the diagonal has small blocks (a
sampling step has G rows per anchor); large parts read fewer keys twice.

Base keys come in blocks of BLOCK_N that every row of the tile sees completely and that need no mask. Only the edges are
masked: around the tile's smallest and largest anchor, the edge of a window, left padding, and the starts of packed
documents. Their blocks have EDGE_N keys, which is less because on average half of an edge block is waste.

Rows of steps that do not exist (``thought_lengths``) count as rows of an inactive anchor, −1; a tile of such rows has
no keys to process. The anchor of a thought without a query is passed as −1, and so sorted before all others.

Data that no row sees (such keys, everything of inactive anchors) may be NaN, and 0 · NaN is NaN, so masked elements are
not even read.

With a softcap c a score is c · tanh(scale / c · product), else scale · product. Kernels get this as ``scale`` and
``curve_scale``: scale · tanh(curve_scale · product), or without tanh if curve_scale is None.
"""

import triton
import triton.language as tl

# The maximum of an empty set of scores: −inf − (−inf) would be NaN, but exp2(−inf − LOWEST) is 0.
LOWEST = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def original_of(position, order):
    """Return the caller's index of the anchor at ``position`` in the kernel's order."""
    if order is None:
        return position
    else:
        return tl.load(order + position)


@triton.jit
def anchor_of(position, anchors, length):
    """Return the base position of the anchor at ``position``; without anchors, every base position has one."""
    if anchors is None:
        return position
    else:
        return tl.minimum(tl.load(anchors + position), length - 1)


@triton.jit
def start_of(position, batch, key_start, num_anchors, PER_ANCHOR: tl.constexpr):
    """Return the first base key of the anchors at ``position``; a scalar if it is the same for the whole batch."""
    if key_start is None:
        return tl.full((), 0, tl.int32)
    elif PER_ANCHOR:
        return tl.load(key_start + (batch * num_anchors + position)).to(tl.int32)
    else:
        return tl.load(key_start + batch).to(tl.int32)


@triton.jit
def step_of(rows, thought_steps, STEPS: tl.constexpr, GROUP: tl.constexpr):
    """Return the steps, 0..T−1, of packed rows."""
    return (rows // GROUP) % STEPS + (thought_steps - STEPS)


@triton.jit
def existing(anchor, step, length):
    """Return the ``anchor`` of rows, −1 if their ``step`` does not exist. Here and below, ``length`` None means T."""
    if length is None:
        return anchor
    else:
        return tl.where(step < length, anchor, -1)


@triton.jit
def first_of_step(first, anchor, step, step_window):
    """Return the ``first`` base key of rows, given a window measured from their own position, anchor + 1 + step."""
    if step_window is None:
        return first
    else:
        return tl.maximum(first, (anchor + step + 2 - step_window).to(tl.int32))


@triton.jit
def positions_of_tile(tile_start, num_rows, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, TILE_ANCHORS: tl.constexpr):
    """Return the positions of the anchors of a tile's rows, padded by repeating the last: [TILE_ANCHORS]."""
    last = (tl.minimum(tile_start + BLOCK_M, num_rows) - 1) // ROWS
    return tl.minimum(tile_start // ROWS + tl.arange(0, TILE_ANCHORS), last)


@triton.jit
def row_offsets(rows, original, stride, STEPS: tl.constexpr, GROUP: tl.constexpr):
    """Return offsets of packed rows in a tensor of one key/value head with strides (batch, head, anchor, step)."""
    step = (rows // GROUP) % STEPS
    return original.to(tl.int64) * stride[2] + step.to(tl.int64) * stride[3] + (rows % GROUP).to(tl.int64) * stride[1]


@triton.jit
def table_rows(rows, position, anchor_rows, ROWS: tl.constexpr):
    """Return the places of packed ``rows`` of the anchors at ``position`` in the backward's row tables.

    With thought lengths, rows of steps that do not exist come first. Then ``anchor_rows`` [P + 1] says where the
    existing rows of each anchor begin, and where those of the last anchor end.
    """
    if anchor_rows is None:
        return rows
    else:
        missing = tl.load(anchor_rows)
        begin = tl.load(anchor_rows + position)
        end = tl.load(anchor_rows + position + 1)
        own = begin + rows - position * ROWS
        return tl.where(own < end, own, rows - (end - missing))


@triton.jit
def load_vectors(pointer, offsets, mask, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load vectors of HEAD elements at ``offsets``, zero-padded to BLOCK_D; zeros where ``mask`` is False."""
    column = tl.arange(0, BLOCK_D)
    pointers = pointer + (tl.expand_dims(offsets, -1) + column)
    if mask is None:
        if HEAD == BLOCK_D:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=column < HEAD, other=0.0)
    else:
        wanted = tl.expand_dims(mask, -1)
        if HEAD != BLOCK_D:
            wanted = wanted & (column < HEAD)
        return tl.load(pointers, mask=wanted, other=0.0)


@triton.jit
def load_parts(pointer, offsets, mask, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """``load_vectors`` for ``offsets`` [DIAGONALS, n]; for [n], unchanged, if the tile is not divided.

    Loaded as [n, DIAGONALS, ...], with the parts in the middle: with [DIAGONALS, n, ...], all vectors of a part would
    begin in the same banks of shared memory in Triton's products, which gives eight-way bank conflicts.
    """
    if len(offsets.shape) == 1:
        return load_vectors(pointer, offsets, mask, HEAD, BLOCK_D)
    elif mask is None:
        return tl.permute(load_vectors(pointer, tl.trans(offsets), None, HEAD, BLOCK_D), (1, 0, 2))
    else:
        return tl.permute(load_vectors(pointer, tl.trans(offsets), tl.trans(mask), HEAD, BLOCK_D), (1, 0, 2))


@triton.jit
def store_vectors(pointer, offsets, vectors, mask, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store rows of HEAD elements, held in BLOCK_D columns, at ``offsets`` in the dtype of ``pointer``."""
    column = tl.arange(0, BLOCK_D)
    wanted = tl.expand_dims(mask, -1)
    if HEAD != BLOCK_D:
        wanted = wanted & (column < HEAD)
    pointers = pointer + (tl.expand_dims(offsets, -1) + column)
    tl.store(pointers, vectors.to(pointer.dtype.element_ty), mask=wanted)


@triton.jit
def not_before(never_negative, offsets):
    """Return ``offsets``, but keep the compiler from computing them before ``never_negative`` [same shape] is known.

    It would compute addresses of results before the loops, which need the registers, and spill.
    """
    return offsets + (never_negative < 0).to(offsets.dtype)


@triton.jit
def load_block(pointer, stride, block, mask, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load BLOCK_N base keys (or values) from ``block`` on. Only the block's offset needs 64 bits."""
    start = pointer + tl.cast(block, tl.int64) * stride[2]
    return load_vectors(start, tl.arange(0, BLOCK_N) * stride[2], mask, HEAD, BLOCK_D)


@triton.jit
def base_2(scale):
    """Return the scale of scores in base 2. It is never 0, which would turn the −inf of hidden keys into NaN."""
    return tl.maximum(scale, 1e-30) * LOG2_E


@triton.jit
def dot(a, b):
    """Multiply with float32 accumulation: on tensor cores for half precision, in true float32 for float32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def tanh(x):
    """Compute the hyperbolic tangent to a few units in the last place, also near 0."""
    square = x * x
    series = -0.3333277 + square * (0.13315259 + square * (-0.05230258 + square * 0.015739441))
    size = tl.abs(x)
    far = 1 - 2 / (tl.exp2(size * (2 * LOG2_E)) + 1)
    return tl.where(size < 0.55, x + x * square * series, tl.where(x < 0, -far, far))


@triton.jit
def curved(products, curve_scale):
    """Apply the softcap's tanh, if any, to products of query and key; times ``scale`` they are scores."""
    if curve_scale is None:
        return products
    else:
        return tanh(products * curve_scale)


@triton.jit
def with_slope(probability, scores, curve_scale):
    """Multiply ``probability`` by 1 − tanh² if there is a softcap; ``scores`` are ``curved``, −inf where hidden."""
    if curve_scale is None:
        return probability
    else:
        return probability * tl.maximum(1 - scores * scores, 0.0)


@triton.jit
def product_scale(scale, curve_scale):
    """Return the derivative of a score w.r.t. the product of query and key, without the factor 1 − tanh²."""
    if curve_scale is None:
        return scale
    else:
        return scale * curve_scale


@triton.jit
def base_range(anchor, first, window, length, split, splits, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr):
    """Return which base keys one of the splits has to process for the rows of a tile.

    Args:
        anchor: anchor of each row, −1 if inactive.
        first: the first base key of each row (then there is no window), or a scalar for all.

    Returns:
        full_begin, full_end: the keys that every active row sees, in whole blocks of BLOCK_N.
        begin, end, steps, hole_at, hole: the masked blocks. There are ``steps`` of EDGE_N keys from ``begin`` on; at
        step ``hole_at``, ``hole`` keys are skipped. ``end`` is one past the last key.
    """
    high = tl.max(anchor, 0)
    low = tl.minimum(tl.min(tl.where(anchor < 0, length, anchor), 0), high)
    begin = first
    full_begin = first
    if len(first.shape) > 0:
        begin = tl.min(tl.where(first <= anchor, first, length), 0)
        full_begin = tl.max(tl.where(anchor < 0, 0, first), 0)
    elif window is not None:
        begin = tl.maximum(first, low - window + 1)
        full_begin = tl.maximum(first, high - window + 1)
    end = high + 1
    full_begin = tl.cdiv(full_begin, BLOCK_N) * BLOCK_N
    full_end = (low + 1) // BLOCK_N * BLOCK_N

    start = begin // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(end - start, BLOCK_N), splits) * BLOCK_N
    begin = tl.maximum(begin // EDGE_N * EDGE_N, start + split * share)
    end = tl.minimum(end, start + (split + 1) * share)
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.minimum(full_end, end)

    hole_at = tl.cdiv(tl.maximum(tl.minimum(full_begin, end) - begin, 0), EDGE_N)
    behind = tl.maximum(full_begin, full_end)
    steps = hole_at + tl.cdiv(tl.maximum(end - behind, 0), EDGE_N)
    return full_begin, full_end, begin, end, steps, hole_at, behind - (begin + hole_at * EDGE_N)


@triton.jit
def sees_base(anchor, keys, first, window):
    """Whether a row with ``anchor`` sees base ``keys``, from ``first`` on; shapes broadcast."""
    visible = (keys <= anchor) & (keys >= first)
    if window is not None:
        visible = visible & (keys > anchor - window)
    return visible


@triton.jit
def sees_block(anchor, keys, first, window):
    """``sees_base`` for [rows] (or anchors) and [keys]: [rows, keys]."""
    if len(first.shape) > 0:
        first = first[:, None]
    return sees_base(anchor[:, None], keys[None, :], first, window)


@triton.jit
def seen_keys(anchor, keys, first, end, window):
    """Return which base ``keys`` before ``end`` some row of a tile sees, given the tile's anchors.

    Without a window and with one ``first`` for all rows, anchors are not needed. Otherwise no row may see some keys
    between those of two anchors. This is checked per anchor; checking per row would take too many registers.
    """
    if anchor is None:
        return (keys < end) & (keys >= first)
    else:
        return (keys < end) & (tl.max(sees_block(anchor, keys, first, window).to(tl.int32), 0) > 0)


@triton.jit
def divided(rows, DIAGONALS: tl.constexpr):
    """[BLOCK_M, ...] -> [DIAGONALS, DIAGONAL_M, ...]; unchanged if the tile is not divided."""
    if DIAGONALS == 1:
        return rows
    elif len(rows.shape) == 1:
        return tl.reshape(rows, (DIAGONALS, rows.shape[0] // DIAGONALS))
    else:
        return tl.reshape(rows, (DIAGONALS, rows.shape[0] // DIAGONALS, rows.shape[1]))


@triton.jit
def joined(rows, DIAGONALS: tl.constexpr):
    """The inverse of ``divided``."""
    if DIAGONALS == 1:
        return rows
    elif len(rows.shape) == 2:
        return tl.reshape(rows, (rows.shape[0] * rows.shape[1],))
    else:
        return tl.reshape(rows, (rows.shape[0] * rows.shape[1], rows.shape[2]))


@triton.jit
def diagonal_columns(tile_start, chunk, thought_steps, ROWS: tl.constexpr, DIAGONALS: tl.constexpr,
                     DIAGONAL_M: tl.constexpr, DIAGONAL_N: tl.constexpr):  # fmt: skip
    """Return anchor position and step of the thought keys in the columns from ``chunk`` on of each part of a tile.

    Shapes are [(DIAGONALS,) DIAGONAL_N]; ROWS is S·G. The columns of a part are the thought keys of its anchors in
    order, T per anchor.
    """
    column = chunk + tl.arange(0, DIAGONAL_N)
    if DIAGONALS == 1:
        return tile_start // ROWS + column // thought_steps, (column % thought_steps).to(tl.int64)
    else:
        first = (tile_start + tl.arange(0, DIAGONALS) * DIAGONAL_M) // ROWS
        position = first[:, None] + (column // thought_steps)[None, :]
        step = (column % thought_steps).to(tl.int64)
        return position, tl.broadcast_to(step[None, :], (DIAGONALS, DIAGONAL_N))


@triton.jit
def diagonal_end(index, position, anchor, step, length, thought_steps, ROWS: tl.constexpr, DIAGONAL_M: tl.constexpr,
                 DIAGONAL_ANCHORS: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    """Return one past the last column of ``diagonal_columns`` that some row of a tile sees, given the tile's rows.

    Without lengths, all steps of all anchors are included.
    """
    if length is None:
        return DIAGONAL_ANCHORS * thought_steps
    else:
        end = step + 1 if CAUSAL else length
        before = position - index // DIAGONAL_M * DIAGONAL_M // ROWS  # anchors of the part before the row's own
        return tl.max(tl.where(anchor < 0, 0, before * thought_steps + end), 0)


@triton.jit
def readable(step, length, step_window, thought_steps, STEPS: tl.constexpr):
    """Return the ``step`` of a thought key or, if no row sees it (it may be NaN), that of a key which some row sees."""
    if step_window is not None:
        step = tl.maximum(step, thought_steps - STEPS + 1 - step_window)
    if length is not None:  # the last existing step, which has a row unless the anchor is inactive
        step = tl.maximum(tl.minimum(step, length - 1), 0)
    return step


@triton.jit
def owner_of(position, step, length, CAUSAL: tl.constexpr):
    """Return the ``position`` of the anchor that thought keys belong to, −1 for steps that do not exist.

    If CAUSAL, existing rows do not see such steps anyway.
    """
    if CAUSAL or length is None:
        return position
    else:
        return tl.where(step < length, position, -1)


@triton.jit
def sees_thought(owner, step, row_position, row_step, step_window, CAUSAL: tl.constexpr):
    """Whether rows see thought keys, given the anchors and steps of both; shapes broadcast."""
    visible = owner == row_position
    if CAUSAL:
        visible = visible & (step <= row_step)
    if step_window is not None:
        visible = visible & (step > row_step - step_window)
    return visible


@triton.jit
def transposed(vectors):
    """[..., n, D] -> [..., D, n]."""
    if len(vectors.shape) == 2:
        return tl.trans(vectors)
    else:
        return tl.permute(vectors, (0, 2, 1))
