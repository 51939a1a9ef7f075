"""Backward of thought attention in Triton, second and third kernel: gradients of keys and values.

There are no atomics, and every sum has a fixed order: a program holds a block of keys and accumulates, in registers,
over all rows that see them, including all steps of an anchor and the whole head group.

- Base keys: the rows of all anchors in or after the block. Since anchors are sorted, this is one range of rows. If
  anchors have their own first keys, it ends where those of all further anchors are after the block. Programs process
  the range from its end, so that those of one head read the same rows at the same time, from the L2 cache.
- Thought keys: the rows of one anchor, or of a few anchors whose thoughts fit a block together.

Scores are computed transposed, Sᵀ = K · Qᵀ, so that no accumulator has to be transposed. This takes four matrix
products per (row, key), of which two (S and dP) repeat ``triton_backward_query``: the price of needing neither atomics
nor partial gradients of the queries, of which there are G·S times as many as keys.

Rows are found through the tables that ``triton_backward_query`` writes: sorted by anchor, with their offsets in query
and dO. (Computing these here would raise the loop's 398 instructions to 471, and spill.) Rows of inactive anchors and
of steps that do not exist come first in the tables and cost nothing here.
"""

import triton
import triton.language as tl

from quietstar.ops.thought_attention.triton_order import place_of
from quietstar.ops.thought_attention.triton_tiles import (
    base_2,
    curved,
    dot,
    load_vectors,
    original_of,
    owner_of,
    product_scale,
    sees_base,
    sees_thought,
    step_of,
    store_vectors,
    table_rows,
    with_slope,
)


@triton.jit
def _step(grad_key, grad_value, key, value, query, grad_output, visible, log_sum, delta, scale, curve_scale):
    """Add the contribution of a tile of rows to the gradients of a block of keys and values; scores are [keys, rows].

    In this order, registers hold only one product of size [keys, rows] at a time.
    """
    scores = curved(dot(key, tl.trans(query)), curve_scale)
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    probability = tl.exp2(scores * scale - log_sum[None, :])
    weight = with_slope(probability, scores, curve_scale)
    grad_value += dot(probability.to(query.dtype), grad_output)
    grad_probability = dot(value, tl.trans(grad_output)) - delta[None, :]
    grad_scores = weight * grad_probability
    if visible is not None:  # hidden keys have probability 0, but the product with their values may be NaN
        grad_scores = tl.where(weight == 0, 0.0, grad_scores)
    return grad_key + dot(grad_scores.to(query.dtype), query), grad_value


@triton.jit
def _load_rows(
    query, grad_output, row_log_sum, row_delta, row_query, row_grad, rows, seeing,
    QUERY_UNIT: tl.constexpr, GRAD_UNIT: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_HEAD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Load query, dO, lse and delta of rows; query and dO, which may be NaN there, are 0 where ``seeing`` is False.

    Without ``row_grad``, dO has the offsets of the query.
    """
    query_offsets = tl.load(row_query + rows).to(tl.int64) * QUERY_UNIT
    grad_offsets = query_offsets
    if row_grad is not None:
        grad_offsets = tl.load(row_grad + rows).to(tl.int64) * GRAD_UNIT
    q = load_vectors(query, query_offsets, seeing, HEAD, BLOCK_D)
    do = load_vectors(grad_output, grad_offsets, seeing, VALUE_HEAD, BLOCK_V)
    return q, do, tl.load(row_log_sum + rows), tl.load(row_delta + rows)


@triton.jit
def _first_from(values, count, least):
    """Return the first index in ascending ``values`` whose value is ≥ ``least``; ``count`` if there is none."""
    low = 0
    high = count
    while low < high:
        middle = (low + high) // 2
        before = tl.load(values + middle) < least
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _rows_before(row_anchor, num_rows, least, ROWS: tl.constexpr):
    """Return how many rows have an anchor before base position ``least``; without ``row_anchor``, ROWS per position."""
    if row_anchor is None:
        return tl.minimum(least * ROWS, num_rows)
    else:
        return _first_from(row_anchor, num_rows, least)


@triton.jit
def _steps_base(
    grad_key, grad_value, key, value, query, grad_output,
    row_anchor, row_start, row_log_sum, row_delta, row_query, row_grad,
    keys, window, begin, end, steps, apart, hole_at, hole, scale, curve_scale,
    MASKED: tl.constexpr, ROWS: tl.constexpr, QUERY_UNIT: tl.constexpr, GRAD_UNIT: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Run ``_step`` on ``steps`` tiles of rows, ``apart`` rows from each other, backwards from the one before ``end``.

    MASKED: at step ``hole_at``, ``hole`` rows are skipped, and the last tile may extend beyond ``begin``. Without
    ``row_anchor``, base positions (``keys``, ``window``) are multiplied by ROWS, to be compared with row numbers.
    """
    for i in tl.range(0, steps):
        rows = end - BLOCK_M - i * apart + tl.arange(0, BLOCK_M)
        visible = None
        if MASKED:
            rows -= tl.where(i < hole_at, 0, hole)
            wanted = rows >= begin
            rows = tl.maximum(rows, begin)  # earlier rows may belong to inactive anchors, and be NaN
            anchor = rows if row_anchor is None else tl.load(row_anchor + rows)
            first = 0
            if row_start is None:
                anchor = tl.where(wanted, anchor, -1)
            else:
                first = tl.load(row_start + rows)
                if row_anchor is None:
                    first *= ROWS
                first = tl.where(wanted, first, 2**31 - 1)[None, :]
            visible = sees_base(anchor[None, :], keys[:, None], first, window)
        q, do, log_sum, delta = _load_rows(
            query, grad_output, row_log_sum, row_delta, row_query, row_grad, rows, None,
            QUERY_UNIT, GRAD_UNIT, HEAD, BLOCK_D, VALUE_HEAD, BLOCK_V,
        )  # fmt: skip
        grad_key, grad_value = _step(
            grad_key, grad_value, key, value, q, do, visible, log_sum, delta, scale, curve_scale
        )
    return grad_key, grad_value


@triton.jit
def _turns(steps, split, splits):
    """Return how many of ``steps`` a split takes that begins with step ``split`` and takes every ``splits``-th."""
    return tl.cdiv(tl.maximum(steps - split, 0), splits)


@triton.jit
def _rows_in_front(position, batch, anchor_rows, num_anchors, rows_of_an_anchor):
    """Return how many rows precede those of the anchor at ``position`` in the row tables."""
    if anchor_rows is None:
        return position * rows_of_an_anchor
    else:
        return tl.load(anchor_rows + batch * (num_anchors + 1) + position)


@triton.jit
def _store_keys(pointer, start, vectors, rest, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store a block of contiguous vectors from ``start`` on, but only the first ``rest`` of them."""
    element = tl.reshape(tl.arange(0, BLOCK_N * BLOCK_D), (BLOCK_N, BLOCK_D))
    row = element // BLOCK_D
    column = element % BLOCK_D
    wanted = (row < rest) & (column < HEAD)
    tl.store(pointer + start * HEAD + (row * HEAD + column), vectors.to(pointer.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["num_rows", "rows_of_an_anchor", "length", "window", "splits", "together"])
def key_gradient_kernel(
    grad_output, query, key, value, done, key_start, start_bounds, anchor_rows,
    row_anchor, row_start, row_log_sum, row_delta, row_query, row_grad, grad_key, grad_value,
    grad_output_stride, query_stride, key_stride, value_stride,
    batches, kv_heads, num_rows, rows_of_an_anchor, length, window, splits, together, scale, curve_scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, QUERY_UNIT: tl.constexpr, GRAD_UNIT: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, EDGE_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block of base keys and values, contiguous [splits, B, Hkv, L, D or Dv].

    The first base key is ``key_start`` [B]. With ``start_bounds`` [2, B, P], it is in ``row_start`` and there is no
    window; the bounds are the largest up to each anchor and the smallest from it on, in anchor order; both ascend.
    ``anchor_rows`` is that of ``table_rows`` and used only with the bounds. Without ``row_anchor``, every base position
    has an anchor, in order, and ROWS rows.

    If ``done`` holds a number other than 0, another kernel has already done the work, and this one does nothing.
    With splits > 1, each program takes a part of the rows, and the parts must be summed afterwards. ``scale`` ≥ 0.
    Grid: key blocks · Hkv · B · splits programs, in the order of ``place_of``.
    """
    if done is not None and tl.load(done) != 0:
        return
    num_blocks = tl.cdiv(length, BLOCK_N)
    place = place_of(tl.program_id(0), num_blocks, kv_heads, splits, together)
    block = place[0] * BLOCK_N  # the first blocks have the most rows
    batch, head, split = place[1].to(tl.int64), place[2].to(tl.int64), place[3]

    grad_output += batch * grad_output_stride[0] + head * GROUP * grad_output_stride[1]
    query += batch * query_stride[0] + head * GROUP * query_stride[1]
    key += batch * key_stride[0] + head * key_stride[1]
    value += batch * value_stride[0] + head * value_stride[1]
    table = (batch * kv_heads + head) * num_rows
    if row_anchor is not None:
        row_anchor += table
    if row_start is not None:
        row_start += table
    row_log_sum += table
    row_delta += table
    row_query += table
    if row_grad is not None:
        row_grad += table

    keys = block + tl.arange(0, BLOCK_N)
    near = tl.minimum(keys, length - 1)  # surplus keys repeat the last one and are not stored
    k = load_vectors(key, near.to(tl.int64) * key_stride[2], None, HEAD, BLOCK_D)
    v = load_vectors(value, near.to(tl.int64) * value_stride[2], None, VALUE_HEAD, BLOCK_V)

    # Rows in [begin, full) see some of the block's keys, those in [full, tail) all of them and, with a window or with
    # first keys of their own, those in [tail, end) possibly some. Masked tiles take the rows that whole unmasked tiles
    # leave over. They come first, so that the long unmasked loop has most registers to itself. Splits take turns.
    last_key = tl.minimum(block + BLOCK_N, length) - 1
    begin = _rows_before(row_anchor, num_rows, block, ROWS)
    full = _rows_before(row_anchor, num_rows, last_key, ROWS)
    end = num_rows
    if start_bounds is not None:
        num_anchors = num_rows // rows_of_an_anchor
        start_bounds += batch * num_anchors
        end = _first_from(start_bounds + batches * num_anchors, num_anchors, last_key + 1)
        end = tl.maximum(_rows_in_front(end, batch, anchor_rows, num_anchors, rows_of_an_anchor), begin)
    elif window is not None:
        end = _rows_before(row_anchor, num_rows, last_key + window, ROWS)
    first = 0
    if key_start is not None:
        first = tl.load(key_start + batch).to(tl.int32)
        end = tl.where(last_key < first, begin, end)  # all of it is padding
    tail_steps = 0
    if start_bounds is not None:
        tail = _first_from(start_bounds, num_anchors, block + 1)
        tail = _rows_in_front(tail, batch, anchor_rows, num_anchors, rows_of_an_anchor)
        tail_steps = tl.cdiv(tl.maximum(end - tl.maximum(tail, begin), 0), EDGE_M)
    elif window is not None:
        tail = _rows_before(row_anchor, num_rows, block + window, ROWS)
        tail_steps = tl.cdiv(tl.maximum(end - tl.maximum(tail, begin), 0), EDGE_M)
    full_end = end - tail_steps * EDGE_M
    full_steps = tl.maximum(full_end - tl.maximum(full, begin), 0) // BLOCK_M
    full_rows = full_steps * BLOCK_M
    masked_steps = tail_steps + tl.cdiv(tl.maximum(full_end - full_rows - begin, 0), EDGE_M)
    turn = (split + splits - masked_steps % splits) % splits  # splits continue taking turns after the masked tiles

    position = keys
    if row_anchor is None:
        position = keys * ROWS
        if window is not None:
            window *= ROWS

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    dk, dv = _steps_base(
        dk, dv, k, v, query, grad_output, row_anchor, row_start, row_log_sum, row_delta, row_query, row_grad,
        position, window, begin, end - split * EDGE_M, _turns(masked_steps, split, splits), splits * EDGE_M,
        _turns(tail_steps, split, splits), full_rows, base_2(scale), curve_scale,
        True, ROWS, QUERY_UNIT, GRAD_UNIT, HEAD, BLOCK_D, VALUE_HEAD, BLOCK_V, EDGE_M,
    )  # fmt: skip
    dk, dv = _steps_base(
        dk, dv, k, v, query, grad_output, row_anchor, row_start, row_log_sum, row_delta, row_query, row_grad,
        position, window, begin, full_end - turn * BLOCK_M, _turns(full_steps, turn, splits), splits * BLOCK_M, 0, 0,
        base_2(scale), curve_scale,
        False, ROWS, QUERY_UNIT, GRAD_UNIT, HEAD, BLOCK_D, VALUE_HEAD, BLOCK_V, BLOCK_M,
    )  # fmt: skip
    dk *= product_scale(scale, curve_scale)

    if key_start is not None:  # no row sees padding, so dropping its gradients is enough
        padding = keys < first
        dk = tl.where(padding[:, None], 0.0, dk)
        dv = tl.where(padding[:, None], 0.0, dv)
    if row_anchor is None:  # both compute the same; in each case this form needs fewer registers
        part = ((split * batches + place[1]) * kv_heads + place[2]).to(tl.int64)
    else:
        part = (batch + split * batches) * kv_heads + head
    start = part * length + block
    _store_keys(grad_key, start, dk, length - block, HEAD, BLOCK_D, BLOCK_N)
    _store_keys(grad_value, start, dv, length - block, VALUE_HEAD, BLOCK_V, BLOCK_N)


@triton.jit(do_not_specialize=["num_anchors", "thought_steps", "together", "step_window"])
def thought_gradient_kernel(
    grad_output, query, thought_key, thought_value, order, thought_lengths, anchor_rows,
    row_log_sum, row_delta, row_query, row_grad, grad_thought_key, grad_thought_value,
    grad_output_stride, query_stride, thought_key_stride, thought_value_stride, anchors_stride,
    kv_heads, num_anchors, thought_steps, together, step_window, scale, curve_scale,
    STEPS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, QUERY_UNIT: tl.constexpr, GRAD_UNIT: tl.constexpr,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute gradients of the thought keys and values of ``together`` anchors that fit BLOCK_N, or of a block of one.

    The gradients are contiguous. ``anchor_rows`` is given if and only if ``thought_lengths`` is. ``scale`` ≥ 0.
    Grid: blocks of an anchor · groups of anchors · B · Hkv programs.
    """
    ROWS: tl.constexpr = STEPS * GROUP
    num_groups = tl.cdiv(num_anchors, together)
    num_blocks = tl.cdiv(thought_steps, BLOCK_N)
    program = tl.program_id(0)
    block = program % num_blocks * BLOCK_N
    first = program // num_blocks % num_groups * together
    batch = (program // (num_blocks * num_groups) // kv_heads).to(tl.int64)
    head = (program // (num_blocks * num_groups) % kv_heads).to(tl.int64)

    grad_output += batch * grad_output_stride[0] + head * GROUP * grad_output_stride[1]
    query += batch * query_stride[0] + head * GROUP * query_stride[1]
    thought_key += batch * thought_key_stride[0] + head * thought_key_stride[1]
    thought_value += batch * thought_value_stride[0] + head * thought_value_stride[1]
    table = (batch * kv_heads + head) * num_anchors * ROWS
    row_log_sum += table
    row_delta += table
    row_query += table
    if row_grad is not None:
        row_grad += table
    if order is not None:
        order += batch * anchors_stride
    if thought_lengths is not None:
        thought_lengths += batch * anchors_stride
        anchor_rows += batch * (num_anchors + 1)

    column = block + tl.arange(0, BLOCK_N)
    position = first + column // thought_steps
    step = (column % thought_steps).to(tl.int64)
    exists = (column < together * thought_steps) & (position < num_anchors)
    near = tl.minimum(position, num_anchors - 1)
    original = original_of(near, order).to(tl.int64)
    key_offsets = original * thought_key_stride[2] + step * thought_key_stride[3]
    value_offsets = original * thought_value_stride[2] + step * thought_value_stride[3]
    k = load_vectors(thought_key, key_offsets, None, HEAD, BLOCK_D)
    v = load_vectors(thought_value, value_offsets, None, VALUE_HEAD, BLOCK_V)
    key_length = None
    if thought_lengths is not None:
        key_length = tl.load(thought_lengths + near).to(tl.int32)
    owner = owner_of(position, step, key_length, CAUSAL)

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    last = tl.minimum(first + together, num_anchors)
    end = last * ROWS
    if thought_lengths is not None:  # excludes rows after the last one, and all of them if no key is seen
        rows_of_last = tl.load(anchor_rows + last) - tl.load(anchor_rows + last - 1)  # 0 if inactive, as then all are
        seen = (rows_of_last > 0) & (block < tl.load(thought_lengths + last - 1))
        end = tl.where(seen, end - ROWS + rows_of_last, first * ROWS)
    for tile in tl.range(first * ROWS, end, BLOCK_M):
        index = tile + tl.arange(0, BLOCK_M)
        rows = tl.minimum(index, end - 1)
        row_position = rows // ROWS
        in_table = table_rows(rows, row_position, anchor_rows, ROWS)
        seeing = None
        if order is not None:  # anchors are given, and some may be inactive: probability 0
            seeing = tl.load(row_log_sum + in_table) != float("inf")
        q, do, log_sum, delta = _load_rows(
            query, grad_output, row_log_sum, row_delta, row_query, row_grad, in_table, seeing,
            QUERY_UNIT, GRAD_UNIT, HEAD, BLOCK_D, VALUE_HEAD, BLOCK_V,
        )  # fmt: skip
        row_step = step_of(rows, thought_steps, STEPS, GROUP)
        visible = sees_thought(
            owner[:, None], step[:, None], row_position[None, :], row_step[None, :], step_window, CAUSAL
        )
        visible = visible & (index < end)[None, :]
        if order is not None:
            visible = visible & seeing[None, :]
        dk, dv = _step(dk, dv, k, v, q, do, visible, log_sum, delta, base_2(scale), curve_scale)
    dk *= product_scale(scale, curve_scale)

    vector = ((batch * kv_heads + head) * num_anchors + original) * thought_steps + step
    store_vectors(grad_thought_key, vector * HEAD, dk, exists, HEAD, BLOCK_D)
    store_vectors(grad_thought_value, vector * VALUE_HEAD, dv, exists, VALUE_HEAD, BLOCK_V)
