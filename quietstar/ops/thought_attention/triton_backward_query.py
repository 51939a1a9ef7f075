"""Backward of thought attention in Triton, first kernel: gradient of the queries.

A program holds a tile of packed rows (see ``triton_tiles``) and processes the keys that the tile sees, as the forward
does. With p = exp2(scale · s − lse) and delta = rowsum(dO · O) − dlse, the gradient of a score s is
dS = p · (dO · Vᵀ − delta), and dQ = scale · dS · K: three matrix products of 2·D FLOPs per (row, key). A softcap c adds
the factor 1 − (s / c)².

For the key-stationary kernels (``triton_backward_key``), it writes tables [B, Hkv, rows] of what they need of each row:
anchor (unless every base position has one, in order), first base key (if anchors have their own), lse, delta, and the
row's offset in query and, if different, in dO. Offsets are counted in units that divide all strides, so that they are
small and need few registers. The kernels can then read rows in table order. Rows of steps that do not exist come first
in the tables, like those of inactive anchors; after them, anchors ascend (``table_rows``).
"""

import triton
import triton.language as tl

from quietstar.ops.thought_attention.triton_order import place_of
from quietstar.ops.thought_attention.triton_tiles import (
    LOG2_E,
    anchor_of,
    base_2,
    base_range,
    curved,
    diagonal_columns,
    diagonal_end,
    divided,
    dot,
    existing,
    first_of_step,
    joined,
    load_block,
    load_parts,
    load_vectors,
    original_of,
    owner_of,
    positions_of_tile,
    product_scale,
    readable,
    row_offsets,
    seen_keys,
    sees_block,
    sees_thought,
    start_of,
    step_of,
    store_vectors,
    table_rows,
    transposed,
    with_slope,
)


@triton.jit
def _step(grad_query, query, grad_output, key, value, visible, log_sum, delta, scale, curve_scale):
    """Add the contribution of a block of keys to the gradient of a tile's queries; all [..., rows or keys, D or Dv].

    The two products of size [rows, keys] are computed one after the other, so that registers hold only one of them.
    """
    scores = curved(dot(query, transposed(key)), curve_scale)
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    probability = tl.exp2(scores * scale - tl.expand_dims(log_sum, -1))
    weight = with_slope(probability, scores, curve_scale)
    grad_probability = dot(grad_output, transposed(value)) - tl.expand_dims(delta, -1)
    return grad_query + dot((weight * grad_probability).to(key.dtype), key)


@triton.jit
def _steps_base(
    grad_query, query, grad_output, key, value, key_stride, value_stride, anchor, first, tile_anchor, tile_first,
    window, begin, end, steps, hole_at, hole, log_sum, delta, scale, curve_scale,
    MASKED: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``_step`` over ``steps`` blocks of base keys from ``begin`` on; ``base_range`` explains the bounds of MASKED."""
    for i in tl.range(0, steps):
        block = begin + i * BLOCK_N
        seen = None
        visible = None
        if MASKED:
            block += tl.where(i < hole_at, 0, hole)
            keys = block + tl.arange(0, BLOCK_N)
            seen = seen_keys(tile_anchor, keys, tile_first, end, window)
            visible = sees_block(anchor, keys, first, window)
        k = load_block(key, key_stride, block, seen, HEAD, BLOCK_D, BLOCK_N)
        v = load_block(value, value_stride, block, seen, VALUE_HEAD, BLOCK_V, BLOCK_N)
        grad_query = _step(grad_query, query, grad_output, k, v, visible, log_sum, delta, scale, curve_scale)
    return grad_query


@triton.jit(do_not_specialize=["num_anchors", "length", "thought_steps", "window", "step_window", "together"])
def query_gradient_kernel(
    grad_output, grad_lse, query, key, value, thought_key, thought_value, output, lse, anchors, order, thought_lengths,
    key_start, anchor_rows,
    grad_query, row_anchor, row_start, row_log_sum, row_delta, row_query, row_grad,
    grad_output_stride, grad_lse_stride, query_stride, key_stride, value_stride, thought_key_stride,
    thought_value_stride, lse_stride, anchors_stride,
    kv_heads, num_anchors, length, thought_steps, window, step_window, scale, curve_scale, together,
    STEPS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, QUERY_UNIT: tl.constexpr, GRAD_UNIT: tl.constexpr,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr, DIAGONAL_M: tl.constexpr, DIAGONAL_N: tl.constexpr,
    DIAGONAL_ANCHORS: tl.constexpr, PER_ANCHOR: tl.constexpr, TILE_ANCHORS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the queries of a tile, and its part of the row tables.

    The mask is as in the forward. The table ``row_start`` exists if first keys may differ between rows: if PER_ANCHOR,
    or with a ``step_window``. ``anchor_rows`` exists if ``thought_lengths`` does. ``scale`` ≥ 0. Output, lse and
    ``grad_query`` are contiguous. Grid: tiles · B · Hkv programs.
    """
    ROWS: tl.constexpr = STEPS * GROUP
    DIAGONALS: tl.constexpr = BLOCK_M // DIAGONAL_M
    num_rows = num_anchors * ROWS
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    place = place_of(tl.program_id(0), num_tiles, kv_heads, 1, together)
    tile_start = (num_tiles - 1 - place[0]) * BLOCK_M  # the longest rows first
    batch, head = place[1].to(tl.int64), place[2].to(tl.int64)

    grad_output += batch * grad_output_stride[0] + head * GROUP * grad_output_stride[1]
    query += batch * query_stride[0] + head * GROUP * query_stride[1]
    key += batch * key_stride[0] + head * key_stride[1]
    value += batch * value_stride[0] + head * value_stride[1]
    thought_key += batch * thought_key_stride[0] + head * thought_key_stride[1]
    thought_value += batch * thought_value_stride[0] + head * thought_value_stride[1]
    first_row = batch * lse_stride[0] + head * GROUP * lse_stride[1]
    if anchors is not None:
        anchors += batch * anchors_stride
    if order is not None:
        order += batch * anchors_stride
    if thought_lengths is not None:
        thought_lengths += batch * anchors_stride
        anchor_rows += batch * (num_anchors + 1)

    index = tile_start + tl.arange(0, BLOCK_M)
    exists = index < num_rows
    rows = tl.minimum(index, num_rows - 1)  # a tile's surplus rows repeat the last one and are not stored
    position = rows // ROWS
    step = step_of(rows, thought_steps, STEPS, GROUP)
    thought_length = None
    if thought_lengths is not None:
        thought_length = tl.load(thought_lengths + position).to(tl.int32)
    original = original_of(position, order)
    anchor = existing(anchor_of(position, anchors, length), step, thought_length)
    first = start_of(position, batch, key_start, num_anchors, PER_ANCHOR)
    first = first_of_step(first, anchor, step, step_window)
    query_offsets = row_offsets(rows, original, query_stride, STEPS, GROUP)
    grad_offsets = row_offsets(rows, original, grad_output_stride, STEPS, GROUP)
    row = first_row + row_offsets(rows, original, lse_stride, STEPS, GROUP)
    q = load_vectors(query, query_offsets, None, HEAD, BLOCK_D)
    do = load_vectors(grad_output, grad_offsets, None, VALUE_HEAD, BLOCK_V)
    o = load_vectors(output, row * VALUE_HEAD, None, VALUE_HEAD, BLOCK_V)

    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    log_sum = tl.load(lse + row) * LOG2_E
    if grad_lse is not None:
        grad_lse += batch * grad_lse_stride[0] + head * GROUP * grad_lse_stride[1]
        delta -= tl.load(grad_lse + row_offsets(rows, original, grad_lse_stride, STEPS, GROUP))
    if anchors is not None:  # makes probabilities of inactive rows 0
        delta = tl.where(anchor < 0, 0.0, delta)
        log_sum = tl.where(anchor < 0, float("inf"), log_sum)
    table = (batch * kv_heads + head) * num_rows + table_rows(index, position, anchor_rows, ROWS)
    if row_anchor is not None:
        tl.store(row_anchor + table, anchor, mask=exists)
    if row_start is not None:
        tl.store(row_start + table, first, mask=exists)
    tl.store(row_log_sum + table, log_sum, mask=exists)
    tl.store(row_delta + table, delta, mask=exists)
    tl.store(row_query + table, query_offsets // QUERY_UNIT, mask=exists)
    if row_grad is not None:
        tl.store(row_grad + table, grad_offsets // GRAD_UNIT, mask=exists)

    # The base keys: first the masked blocks, then the full ones. (After the thought keys, ptxas would wait for each
    # product, C7515, since products of the thought keys, of another shape, would add to the same sum.)
    tile_anchor = None
    tile_first = first
    if window is not None or step_window is not None or PER_ANCHOR:
        tile_position = positions_of_tile(tile_start, num_rows, ROWS, BLOCK_M, TILE_ANCHORS)
        tile_anchor = anchor_of(tile_position, anchors, length)
        tile_first = start_of(tile_position, batch, key_start, num_anchors, PER_ANCHOR)
        tile_first = first_of_step(tile_first, tile_anchor, thought_steps - STEPS, step_window)
    full_begin, full_end, begin, end, steps, hole_at, hole = base_range(
        anchor, first, window, length, 0, 1, BLOCK_N, EDGE_N
    )
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq = _steps_base(
        dq, q, do, key, value, key_stride, value_stride, anchor, first, tile_anchor, tile_first, window,
        begin, end, steps, hole_at, hole, log_sum, delta, base_2(scale), curve_scale,
        True, HEAD, BLOCK_D, VALUE_HEAD, BLOCK_V, EDGE_N,
    )  # fmt: skip
    dq = _steps_base(
        dq, q, do, key, value, key_stride, value_stride, anchor, first, tile_anchor, tile_first, window,
        full_begin, full_end, (full_end - full_begin) // BLOCK_N, 0, 0, log_sum, delta, base_2(scale), curve_scale,
        False, HEAD, BLOCK_D, VALUE_HEAD, BLOCK_V, BLOCK_N,
    )  # fmt: skip

    # The thought keys, part by part.
    q_parts = q
    do_parts = do
    if DIAGONALS > 1:
        q_parts = load_parts(query, divided(query_offsets, DIAGONALS), None, HEAD, BLOCK_D)
        do_parts = load_parts(grad_output, divided(grad_offsets, DIAGONALS), None, VALUE_HEAD, BLOCK_V)
    log_sum_parts = divided(log_sum, DIAGONALS)
    delta_parts = divided(delta, DIAGONALS)
    row_position = tl.expand_dims(divided(position, DIAGONALS), -1)
    row_step = tl.expand_dims(divided(step, DIAGONALS), -1)
    last_position = (tl.minimum(tile_start + BLOCK_M, num_rows) - 1) // ROWS
    dq = divided(dq, DIAGONALS)
    columns = diagonal_end(
        index, position, anchor, step, thought_length, thought_steps, ROWS, DIAGONAL_M, DIAGONAL_ANCHORS, CAUSAL
    )
    for chunk in tl.range(0, columns, DIAGONAL_N, num_stages=1):
        key_position, key_step = diagonal_columns(
            tile_start, chunk, thought_steps, ROWS, DIAGONALS, DIAGONAL_M, DIAGONAL_N
        )
        near = tl.minimum(key_position, num_anchors - 1)
        if anchors is not None:  # keys of inactive anchors may be NaN; those of the tile's last anchor replace them
            near = tl.where(tl.load(anchors + near) < 0, last_position, near)
        key_length = None
        if thought_lengths is not None:
            key_length = tl.load(thought_lengths + near).to(tl.int32)
        key_original = original_of(near, order).to(tl.int64)
        read_step = readable(key_step, key_length, step_window, thought_steps, STEPS)
        key_offsets = key_original * thought_key_stride[2] + read_step * thought_key_stride[3]
        value_offsets = key_original * thought_value_stride[2] + read_step * thought_value_stride[3]
        k = load_parts(thought_key, key_offsets, None, HEAD, BLOCK_D)
        v = load_parts(thought_value, value_offsets, None, VALUE_HEAD, BLOCK_V)
        owner = tl.expand_dims(owner_of(key_position, key_step, key_length, CAUSAL), -2)
        visible = sees_thought(owner, tl.expand_dims(key_step, -2), row_position, row_step, step_window, CAUSAL)
        dq = _step(dq, q_parts, do_parts, k, v, visible, log_sum_parts, delta_parts, base_2(scale), curve_scale)
    dq = joined(dq, DIAGONALS)

    if anchors is not None:
        dq = tl.where(anchor[:, None] < 0, 0.0, dq)
    original = original_of(tl.minimum(index // ROWS, num_anchors - 1), order)
    row = first_row + row_offsets(index, original, lse_stride, STEPS, GROUP)
    store_vectors(grad_query, row * HEAD, dq * product_scale(scale, curve_scale), exists, HEAD, BLOCK_D)
