"""Forward of thought attention in Triton: one kernel for training tiles, sampling steps and split keys.

One program holds BLOCK_M packed rows (see ``triton_tiles``) of one key/value head. It processes the block diagonal of
thought keys and blocks of base keys with the running softmax of FlashAttention (arXiv 2205.14135, 2307.08691), in
base 2. A row may see nothing of the first blocks; its maximum is then LOWEST and its sums are 0.

A row that sees n base keys takes 4·D·(n + T) FLOPs and reads and writes 2·D elements of query and output; every tile
reads n keys and values from the L2 cache. At n = 1024, D = 128 this is about 1000 FLOPs per byte: compute-bound.

With few rows and many keys (decoding), the keys of a tile are split over several programs, whose partial results
``combine_kernel`` combines in a fixed order.
"""

import triton
import triton.language as tl

from quietstar.ops.thought_attention.triton_order import place_of
from quietstar.ops.thought_attention.triton_tiles import (
    LN_2,
    LOWEST,
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
    not_before,
    original_of,
    owner_of,
    positions_of_tile,
    readable,
    row_offsets,
    seen_keys,
    sees_block,
    sees_thought,
    start_of,
    step_of,
    store_vectors,
    transposed,
)


@triton.jit
def _attend(acc, peak, total, scores, scale, value):
    """Do a step of the running base-2 softmax over scale · ``scores`` [..., rows, keys], ``value`` [..., keys, Dv]."""
    new_peak = tl.maximum(peak, tl.max(scores, -1) * scale)  # scale >= 0: one product per row, not one per score
    probability = tl.exp2(scores * scale - tl.expand_dims(new_peak, -1))
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(probability, -1)
    acc = acc * tl.expand_dims(shrink, -1) + dot(probability.to(value.dtype), value)
    return acc, new_peak, total


@triton.jit
def _attend_base(
    acc, peak, total, query, key, value, key_stride, value_stride, anchor, first, tile_anchor, tile_first, window,
    begin, end, steps, hole_at, hole, scale, curve_scale,
    MASKED: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend to ``steps`` blocks of base keys from ``begin`` on. MASKED: ``base_range`` explains the other bounds."""
    for i in tl.range(0, steps):
        block = begin + i * BLOCK_N
        seen = None
        if MASKED:
            block += tl.where(i < hole_at, 0, hole)
            keys = block + tl.arange(0, BLOCK_N)
            seen = seen_keys(tile_anchor, keys, tile_first, end, window)
        products = dot(query, transposed(load_block(key, key_stride, block, seen, HEAD, BLOCK_D, BLOCK_N)))
        scores = curved(products, curve_scale)
        if MASKED:
            visible = sees_block(anchor, keys, first, window)
            scores = tl.where(visible, scores, float("-inf"))
        block_value = load_block(value, value_stride, block, seen, VALUE_HEAD, BLOCK_V, BLOCK_N)
        acc, peak, total = _attend(acc, peak, total, scores, scale, block_value)
    return acc, peak, total


@triton.jit(do_not_specialize=["num_anchors", "length", "thought_steps", "window", "step_window", "splits", "together"])
def forward_kernel(
    query, key, value, thought_key, thought_value, anchors, order, thought_lengths, key_start, output, lse,
    query_stride, key_stride, value_stride, thought_key_stride, thought_value_stride, lse_stride, anchors_stride,
    kv_heads, num_anchors, length, thought_steps, window, step_window, splits, together, scale, curve_scale,
    STEPS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_HEAD: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr,
    DIAGONAL_M: tl.constexpr, DIAGONAL_N: tl.constexpr, DIAGONAL_ANCHORS: tl.constexpr, SPLIT: tl.constexpr,
    PER_ANCHOR: tl.constexpr, TILE_ANCHORS: tl.constexpr,
):  # fmt: skip
    """Compute output and natural-log lse of a tile; with SPLIT, partial output and base-2 lse for a part of its keys.

    ``key_start`` is contiguous: [B], or if PER_ANCHOR [B, P] in the order of ``anchors``; then ``window`` is None, as
    it is with ``step_window``, which is measured from the step. ``thought_lengths`` is like ``anchors``, which is not
    None then. ``scale`` ≥ 0. Output and lse are contiguous. Grid: tiles · splits · B · Hkv programs.
    """
    ROWS: tl.constexpr = STEPS * GROUP
    DIAGONALS: tl.constexpr = BLOCK_M // DIAGONAL_M
    num_rows = num_anchors * ROWS
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    place = place_of(tl.program_id(0), num_tiles, kv_heads, splits, together)
    tile_start = (num_tiles - 1 - place[0]) * BLOCK_M  # the longest rows first
    batch, head, split = place[1].to(tl.int64), place[2].to(tl.int64), place[3]

    query += batch * query_stride[0] + head * GROUP * query_stride[1]
    key += batch * key_stride[0] + head * key_stride[1]
    value += batch * value_stride[0] + head * value_stride[1]
    thought_key += batch * thought_key_stride[0] + head * thought_key_stride[1]
    thought_value += batch * thought_value_stride[0] + head * thought_value_stride[1]
    if anchors is not None:
        anchors += batch * anchors_stride
    if order is not None:
        order += batch * anchors_stride
    if thought_lengths is not None:
        thought_lengths += batch * anchors_stride

    scale = base_2(scale)
    index = tile_start + tl.arange(0, BLOCK_M)
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
    tile_anchor = None
    tile_first = first
    if window is not None or step_window is not None or PER_ANCHOR:
        tile_position = positions_of_tile(tile_start, num_rows, ROWS, BLOCK_M, TILE_ANCHORS)
        tile_anchor = anchor_of(tile_position, anchors, length)
        tile_first = start_of(tile_position, batch, key_start, num_anchors, PER_ANCHOR)
        tile_first = first_of_step(tile_first, tile_anchor, thought_steps - STEPS, step_window)
    query_offsets = row_offsets(rows, original, query_stride, STEPS, GROUP)
    q = load_vectors(query, query_offsets, None, HEAD, BLOCK_D)

    columns = diagonal_end(
        index, position, anchor, step, thought_length, thought_steps, ROWS, DIAGONAL_M, DIAGONAL_ANCHORS, CAUSAL
    )
    if SPLIT:
        columns = tl.where(split == 0, columns, 0)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Thought keys come first if the tile is not divided. Sums joined from parts come last: entering the loops over base
    # keys, they would make ptxas wait for each product there (C7515).
    for turn in tl.static_range(2):
        if (turn == 0) == (DIAGONALS == 1):
            # The thought keys, part by part.
            if DIAGONALS > 1:  # the loops over base keys leave no registers to keep all of it
                rows = tl.minimum(not_before(total, index), num_rows - 1)
                position = rows // ROWS
                step = step_of(rows, thought_steps, STEPS, GROUP)
                original = original_of(position, order)
                query_offsets = row_offsets(rows, original, query_stride, STEPS, GROUP)
                q_parts = load_parts(query, divided(query_offsets, DIAGONALS), None, HEAD, BLOCK_D)
            else:
                q_parts = q
            row_position = tl.expand_dims(divided(position, DIAGONALS), -1)
            row_step = tl.expand_dims(divided(step, DIAGONALS), -1)
            acc = divided(acc, DIAGONALS)
            peak = divided(peak, DIAGONALS)
            total = divided(total, DIAGONALS)
            # The next keys are prefetched if shared memory has room for them, which those of parts (``load_parts``)
            # cannot be.
            AHEAD: tl.constexpr = DIAGONALS == 1 and max(BLOCK_D, BLOCK_V) <= 128
            for chunk in tl.range(0, columns, DIAGONAL_N, num_stages=2 if AHEAD else 1):
                key_position, key_step = diagonal_columns(
                    tile_start, chunk, thought_steps, ROWS, DIAGONALS, DIAGONAL_M, DIAGONAL_N
                )
                near = tl.minimum(key_position, num_anchors - 1)
                key_length = None
                if thought_lengths is not None:
                    key_length = tl.load(thought_lengths + near).to(tl.int32)
                key_original = original_of(near, order).to(tl.int64)
                read_step = readable(key_step, key_length, step_window, thought_steps, STEPS)
                key_offsets = key_original * thought_key_stride[2] + read_step * thought_key_stride[3]
                value_offsets = key_original * thought_value_stride[2] + read_step * thought_value_stride[3]
                seen = None
                if anchors is not None:
                    seen = tl.load(anchors + near) >= 0
                k = load_parts(thought_key, key_offsets, seen, HEAD, BLOCK_D)
                v = load_parts(thought_value, value_offsets, seen, VALUE_HEAD, BLOCK_V)
                owner = tl.expand_dims(owner_of(key_position, key_step, key_length, CAUSAL), -2)
                visible = sees_thought(owner, tl.expand_dims(key_step, -2), row_position, row_step, step_window, CAUSAL)
                scores = tl.where(visible, curved(dot(q_parts, transposed(k)), curve_scale), float("-inf"))
                acc, peak, total = _attend(acc, peak, total, scores, scale, v)
            acc = joined(acc, DIAGONALS)
            peak = joined(peak, DIAGONALS)
            total = joined(total, DIAGONALS)
        else:
            # The base keys: first the masked blocks, then the full ones.
            full_begin, full_end, begin, end, steps, hole_at, hole = base_range(
                anchor, first, window, length, split, splits, BLOCK_N, EDGE_N
            )
            acc, peak, total = _attend_base(
                acc, peak, total, q, key, value, key_stride, value_stride, anchor, first, tile_anchor, tile_first,
                window, begin, end, steps, hole_at, hole, scale, curve_scale,
                True, HEAD, BLOCK_D, VALUE_HEAD, BLOCK_V, EDGE_N,
            )  # fmt: skip
            acc, peak, total = _attend_base(
                acc, peak, total, q, key, value, key_stride, value_stride, anchor, first, tile_anchor, tile_first,
                window, full_begin, full_end, (full_end - full_begin) // BLOCK_N, 0, 0, scale, curve_scale,
                False, HEAD, BLOCK_D, VALUE_HEAD, BLOCK_V, BLOCK_N,
            )  # fmt: skip

    seen = (anchor >= 0) & (total != 0)
    acc = tl.where(seen[:, None], acc, 0.0)
    peak = tl.where(seen, peak, float("-inf"))
    total = tl.where(seen, total, 1.0)
    acc = acc * (1 / total)[:, None]
    log_sum = peak + tl.log2(total)

    index = not_before(total, index)
    exists = index < num_rows
    if not SPLIT:
        original = original_of(tl.minimum(index // ROWS, num_anchors - 1), order)
        row = batch * lse_stride[0] + head * GROUP * lse_stride[1]
        row += row_offsets(index, original, lse_stride, STEPS, GROUP)
        store_vectors(output, row * VALUE_HEAD, acc, exists, VALUE_HEAD, BLOCK_V)
        tl.store(lse + row, log_sum * LN_2, mask=exists)
    else:
        part = ((batch * kv_heads + head) * splits + split) * num_rows + index
        store_vectors(output, part * VALUE_HEAD, acc, exists, VALUE_HEAD, BLOCK_V)
        tl.store(lse + part, log_sum, mask=exists)


@triton.jit(do_not_specialize=["num_anchors", "splits"])
def combine_kernel(
    parts, part_log_sums, order, output, lse, lse_stride, anchors_stride, kv_heads, num_anchors, splits,
    STEPS: tl.constexpr, GROUP: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Combine the partial results of ``forward_kernel`` in the order of the splits. Grid: tiles · B · Hkv programs."""
    num_rows = num_anchors * STEPS * GROUP
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    program = tl.program_id(0)
    batch = (program // num_tiles // kv_heads).to(tl.int64)
    head = (program // num_tiles % kv_heads).to(tl.int64)
    rows = program % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < num_rows

    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for split in range(splits):
        part = ((batch * kv_heads + head) * splits + split) * num_rows + rows
        log_sum = tl.load(part_log_sums + part, mask=exists, other=float("-inf"))
        new_peak = tl.maximum(peak, log_sum)
        weight = tl.exp2(log_sum - new_peak)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + weight
        partial = load_vectors(parts, part * VALUE_HEAD, exists, VALUE_HEAD, BLOCK_V)
        acc = acc * shrink[:, None] + weight[:, None] * partial
        peak = new_peak

    if order is not None:
        order += batch * anchors_stride
    original = original_of(tl.minimum(rows, num_rows - 1) // (STEPS * GROUP), order)
    row = batch * lse_stride[0] + head * GROUP * lse_stride[1]
    row += row_offsets(rows, original, lse_stride, STEPS, GROUP)
    seen = total != 0
    acc = tl.where(seen[:, None], acc / tl.where(seen, total, 1.0)[:, None], 0.0)
    log_sum = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) * LN_2, float("-inf"))
    store_vectors(output, row * VALUE_HEAD, acc, exists, VALUE_HEAD, BLOCK_V)
    tl.store(lse + row, log_sum, mask=exists)
