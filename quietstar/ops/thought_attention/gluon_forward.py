"""Forward of thought attention in Gluon for Hopper: a producer warp, two groups of consumers, softmax under products.

A program has 128 packed rows (``triton_tiles`` draws them) of one key/value head, 64 for each group of four warps. The
producer fills rings of keys and values (``gluon_pipeline``) by TMA, the keys a block ahead of the values:

    block            thoughts          base keys, masked          base keys, full
                 ┌───────┬───────┐
    columns      │group 0│group 1│    ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓            ████████████████
                 └───────┴───────┘
                 half a block each:    for both groups
                 the thoughts of its
                 own 64 rows alone

The T keys of a thought are a box of BOX_T, a power of two, with zeros behind them; a group takes THOUGHT_ANCHORS boxes
in a step, and several steps where its rows have more anchors, or T is more than half a block.

Within a group the products of one block run under the exponentials of the next, and the groups take turns, so that one
multiplies while the other is at its softmax (FlashAttention-3, arXiv 2407.08608):

    group 0   │ QK(i) PV(i−1) │ softmax(i) ······ │ QK(i+1) PV(i) │
    group 1                   │ QK(i) PV(i−1)     │ softmax(i) ······ │

Values of keys that no row sees may be NaN, and 0 · NaN is NaN: ``gluon_launch.seen_values`` has replaced them, boxes
of inactive anchors are read from beyond the tensor, where there are zeros, and so is what is behind the last key.

One program does one tile. Persistent programs would hide a tile's start and end, by the cycle model 2,500 of 26,000
cycles at L = 2048 and a quarter of that share at 8192, but the producer would have to find out the blocks of every tile
within 24 registers. Programs start with the longest tiles of all heads of a section, for an even end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quietstar.ops.thought_attention.gluon_pipeline import (
    LN_2,
    LOWEST,
    PANEL,
    allocate_ring,
    as_column,
    base_blocks,
    begin_fill,
    block_of,
    curved,
    first_keys,
    gather_rows,
    original_of,
    reinterpreted,
    release,
    row_offsets,
    rows_of,
    store_rows,
    wait_full,
)


@gluon.jit
def _fill(
    base, thoughts, ring, i, anchors, order, batch, head, tile_start, num_anchors, thought_blocks, chunks, bounds,
    ROWS: gl.constexpr, HALF: gl.constexpr, BOX_T: gl.constexpr, THOUGHT_ANCHORS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start to read block ``i`` of keys, or of values, to its ring."""
    if i < thought_blocks:
        _fill_with_thoughts(
            thoughts, ring, i, anchors, order, batch, head, tile_start, num_anchors, chunks,
            ROWS, HALF, BOX_T, THOUGHT_ANCHORS, STAGES,
        )  # fmt: skip
    else:
        place, full = begin_fill(ring, i, base.nbytes_per_cta, STAGES)
        first_key = block_of(i - thought_blocks, bounds) * place.shape[0]
        tma.async_load(base, [batch, head, first_key, 0], full, reinterpreted(place, base.block_shape, base.layout))


@gluon.jit
def _fill_with_thoughts(
    thoughts, ring, i, anchors, order, batch, head, tile_start, num_anchors, chunks,
    ROWS: gl.constexpr, HALF: gl.constexpr, BOX_T: gl.constexpr, THOUGHT_ANCHORS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BOXES: gl.constexpr = ring[0].shape[1] // BOX_T  # of a panel
    PANELS: gl.constexpr = ring[0].shape[2] // PANEL
    place, full = begin_fill(ring, i, 2 * THOUGHT_ANCHORS * PANELS * thoughts.nbytes_per_cta, STAGES)
    boxes = reinterpreted(place, [PANELS * BOXES, 1, 1, 1, BOX_T, PANEL], thoughts.layout)
    for j in range(0, 2 * THOUGHT_ANCHORS):
        group = j // THOUGHT_ANCHORS
        position = (tile_start + group * HALF) // ROWS + i // chunks * THOUGHT_ANCHORS + j % THOUGHT_ANCHORS
        near = gl.minimum(position, num_anchors - 1)
        exists = position < num_anchors
        if anchors is not None:
            exists = exists & (gl.load(anchors + near) >= 0)
        original = gl.where(exists, original_of(near, order), num_anchors)
        for panel in range(0, PANELS):
            box = boxes.index(panel * BOXES + group * (BOXES // 2) + j % THOUGHT_ANCHORS)
            tma.async_load(thoughts, [batch, head, original, i % chunks * BOX_T, panel * PANEL], full, box)


@gluon.jit
def _producer(
    key, value, thought_key, thought_value, key_ring, value_ring, anchors, order, batch, head, tile_start, num_anchors,
    thought_blocks, chunks, bounds,
    ROWS: gl.constexpr, HALF: gl.constexpr, BOX_T: gl.constexpr, THOUGHT_ANCHORS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The keys of a block, then the values of the one before: consumers need them in this order."""
    blocks = thought_blocks + bounds[5]
    for i in range(0, blocks + 1):
        if i < blocks:
            _fill(
                key, thought_key, key_ring, i, anchors, order, batch, head, tile_start, num_anchors, thought_blocks,
                chunks, bounds, ROWS, HALF, BOX_T, THOUGHT_ANCHORS, STAGES,
            )  # fmt: skip
        if i > 0:
            _fill(
                value, thought_value, value_ring, i - 1, anchors, order, batch, head, tile_start, num_anchors,
                thought_blocks, chunks, bounds, ROWS, HALF, BOX_T, THOUGHT_ANCHORS, STAGES,
            )  # fmt: skip


@gluon.jit
def _softmax(scores, peak, total, scale):
    """One step of the running base-2 softmax over scale · ``scores``; ``shrink`` is for the sums so far."""
    ROW: gl.constexpr = peak.type.layout
    new_peak = gl.maximum(peak, gl.convert_layout(gl.max(scores, 1), ROW) * scale)
    probability = gl.exp2(scores * scale - as_column(new_peak, scores))
    shrink = gl.exp2(peak - new_peak)
    total = total * shrink + gl.convert_layout(gl.sum(probability, 1), ROW)
    return probability, shrink, new_peak, total


@gluon.jit
def _products(q, key, N: gl.constexpr):
    """Begin q · keyᵀ: [64, N]."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    zero = gl.zeros((q.shape[0], N), gl.float32, LAYOUT)
    return warpgroup_mma(q, key.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _base_scores(products, block, anchor, first, curve_scale, MASKED: gl.constexpr, BLOCK_N: gl.constexpr):
    """Scores, still to be scaled, of a block of base keys."""
    scores = curved(products, curve_scale)
    if MASKED:
        keys = gl.expand_dims(gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores.type.layout)), 0)
        visible = keys <= as_column(anchor - block * BLOCK_N, scores)
        if first is not None:
            visible = visible & (keys >= as_column(first - block * BLOCK_N, scores))
        scores = gl.where(visible, scores, float("-inf"))
    return scores


@gluon.jit
def _thought_scores(
    products, owner, first_step, position, step, own, step_window, curve_scale, CAUSAL: gl.constexpr,
    BOX_T: gl.constexpr,
):  # fmt: skip
    """The same of boxes of thought keys: those of the anchors from ``owner`` on, from ``first_step`` on."""
    scores = curved(products, curve_scale)
    column = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    key_step = gl.expand_dims(first_step + column % BOX_T, 0)
    visible = gl.expand_dims(owner + column // BOX_T, 0) == as_column(position, scores)
    if CAUSAL:
        visible = visible & (key_step <= as_column(step, scores))
    else:
        visible = visible & (key_step < as_column(own, scores))
    if step_window is not None:
        visible = visible & (key_step > as_column(step - step_window, scores))
    return gl.where(visible, scores, float("-inf"))


@gluon.jit
def _step(
    i, block, acc, p, peak, total, q, key_ring, value_ring, turns, anchor, first, scale, curve_scale,
    MASKED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of block ``i`` and, meanwhile, the product of probabilities and values of the block before.

    Those values are there: the step before has waited for them. It does so behind its softmax, where the branch of the
    wait keeps ptxas from moving ``warpgroup_mma_wait(0)`` in front of the exponentials, which are to run under it.
    """
    my_turn, other_turn = turns
    key = wait_full(key_ring, i, STAGES)
    mbarrier.wait(my_turn, i & 1)
    products = _products(q, key, BLOCK_N)
    acc = warpgroup_mma(p, value_ring[0].index((i - 1) % STAGES), acc, is_async=True)
    mbarrier.arrive(other_turn, count=1)
    products = warpgroup_mma_wait(1, deps=[products])
    release(key_ring, i, STAGES)
    scores = _base_scores(products, block, anchor, first, curve_scale, MASKED, BLOCK_N)
    probability, shrink, peak, total = _softmax(scores, peak, total, scale)
    wait_full(value_ring, i, STAGES)
    acc, probability = warpgroup_mma_wait(0, deps=[acc, probability])
    release(value_ring, i - 1, STAGES)
    p = gl.convert_layout(probability.to(p.dtype), p.type.layout)
    acc = acc * as_column(shrink, acc)
    return acc, p, peak, total


@gluon.jit
def _consumer(
    WHICH: gl.constexpr, query, output, lse, of_anchors, order, q_tile, row_tile, key_ring, value_ring, turns,
    query_stride, lse_stride, sizes, windows, thought_blocks, chunks, bounds, scale, curve_scale,
    STEPS: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr, PER_ANCHOR: gl.constexpr, HEAD: gl.constexpr,
    BLOCK_D: gl.constexpr, VALUE_HEAD: gl.constexpr, BLOCK_V: gl.constexpr, HALF: gl.constexpr, BLOCK_N: gl.constexpr,
    BOX_T: gl.constexpr, THOUGHT_ANCHORS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Output and lse of the first or second half of a tile's rows."""
    ROWS: gl.constexpr = STEPS * GROUP
    THOUGHT_N: gl.constexpr = THOUGHT_ANCHORS * BOX_T
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    dtype: gl.constexpr = query.dtype.element_ty
    anchors, thought_lengths, key_start = of_anchors
    tile_start, num_rows, length, thought_steps = sizes
    window, step_window = windows
    my_turn, other_turn = turns.index(WHICH), turns.index(1 - WHICH)
    begin = tile_start + WHICH * HALF

    q = reinterpreted(q_tile.index(WHICH), [HALF, BLOCK_D], gl.NVMMASharedLayout(128, 16, rank=2))
    gather_rows(q, query, order, query_stride, begin, num_rows, STEPS, GROUP, HEAD)
    index = begin + gl.arange(0, HALF, ROW)
    # Where their results go: kept in shared memory, for registers are short.
    result_rows = row_tile.index(WHICH)
    near = gl.minimum(index, num_rows - 1)
    row = row_offsets(near, original_of(near // ROWS, order), lse_stride, STEPS, GROUP)
    result_rows.store(gl.where(index < num_rows, row, -1))
    fence_async_shared()
    gl.barrier()

    position, step, own, anchor = rows_of(
        index, anchors, thought_lengths, num_rows, length, thought_steps, STEPS, GROUP
    )  # fmt: skip
    first = None
    if key_start is not None or window is not None or step_window is not None:
        first = first_keys(position, step, anchor, key_start, window, step_window, PER_ANCHOR)
    peak = gl.full((HALF,), LOWEST, gl.float32, ROW)
    total = gl.zeros((HALF,), gl.float32, ROW)
    acc = gl.zeros((HALF, BLOCK_V), gl.float32, O_LAYOUT)

    # The thought keys.
    for i in range(0, thought_blocks):
        key = wait_full(key_ring, i, STAGES)
        mbarrier.wait(my_turn, i & 1)
        products = _products(q, key.slice(WHICH * (BLOCK_N // 2), THOUGHT_N), THOUGHT_N)
        mbarrier.arrive(other_turn, count=1)
        products = warpgroup_mma_wait(0, deps=[products])
        release(key_ring, i, STAGES)
        owner = begin // ROWS + i // chunks * THOUGHT_ANCHORS
        scores = _thought_scores(
            products, owner, i % chunks * BOX_T, position, step, own, step_window, curve_scale, CAUSAL, BOX_T
        )
        probability, shrink, peak, total = _softmax(scores, peak, total, scale)
        value = wait_full(value_ring, i, STAGES).slice(WHICH * (BLOCK_N // 2), THOUGHT_N)
        acc = acc * as_column(shrink, acc)
        acc = warpgroup_mma(gl.convert_layout(probability.to(dtype), P_LAYOUT), value, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        release(value_ring, i, STAGES)

    # The base keys: one block to begin with, the other masked ones, the full ones.
    key = wait_full(key_ring, thought_blocks, STAGES)
    mbarrier.wait(my_turn, thought_blocks & 1)
    products = _products(q, key, BLOCK_N)
    mbarrier.arrive(other_turn, count=1)
    products = warpgroup_mma_wait(0, deps=[products])
    release(key_ring, thought_blocks, STAGES)
    scores = _base_scores(products, block_of(0, bounds), anchor, first, curve_scale, True, BLOCK_N)
    probability, shrink, peak, total = _softmax(scores, peak, total, scale)
    p = gl.convert_layout(probability.to(dtype), P_LAYOUT)
    acc = acc * as_column(shrink, acc)
    wait_full(value_ring, thought_blocks, STAGES)
    masked, blocks = bounds[3], bounds[5]
    for i in range(1, masked):
        acc, p, peak, total = _step(
            thought_blocks + i, block_of(i, bounds), acc, p, peak, total, q, key_ring, value_ring,
            (my_turn, other_turn), anchor, first, scale, curve_scale, True, BLOCK_N, STAGES,
        )  # fmt: skip
    for i in range(thought_blocks + masked, thought_blocks + blocks):
        acc, p, peak, total = _step(
            i, 0, acc, p, peak, total, q, key_ring, value_ring,
            (my_turn, other_turn), anchor, first, scale, curve_scale, False, BLOCK_N, STAGES,
        )  # fmt: skip
    acc = warpgroup_mma(p, value_ring[0].index((thought_blocks + blocks - 1) % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])

    seen = (anchor >= 0) & (total != 0)
    total = gl.where(seen, total, 1.0)
    log_sum = gl.where(seen, (peak + gl.log2(total)) * LN_2, float("-inf"))
    acc = gl.where(as_column(seen, acc), acc * as_column(1 / total, acc), 0.0)
    row = result_rows.load(ROW)
    result = reinterpreted(q_tile.index(WHICH), [HALF, BLOCK_V], gl.NVMMASharedLayout(128, 16, rank=2))
    # In another order in each group: LLVM would join the same ends of both, with the number of a barrier in a register.
    if WHICH == 0:
        gl.store(lse + row, log_sum, mask=row >= 0)
    gl.barrier()
    result.store(acc.to(dtype))
    gl.barrier()
    store_rows(output, result, result_rows, VALUE_HEAD)
    if WHICH == 1:
        gl.store(lse + row, log_sum, mask=row >= 0)


@gluon.jit
def _consumer_0(arguments, options: gl.constexpr):
    _consumer(0, *arguments, *options)


@gluon.jit
def _consumer_1(arguments, options: gl.constexpr):
    _consumer(1, *arguments, *options)


@gluon.jit(do_not_specialize=["num_anchors", "length", "thought_steps", "chunks", "window", "step_window", "section"])
def gluon_forward_kernel(
    query, key, value, thought_key, thought_value, anchors, order, thought_lengths, key_start, output, lse,
    query_stride, lse_stride, anchors_stride, kv_heads, heads, section, num_anchors, length, thought_steps, chunks,
    window, step_window, scale, curve_scale,
    STEPS: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr, PER_ANCHOR: gl.constexpr, HEAD: gl.constexpr,
    BLOCK_D: gl.constexpr, VALUE_HEAD: gl.constexpr, BLOCK_V: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BOX_T: gl.constexpr, THOUGHT_ANCHORS: gl.constexpr, GROUP_ANCHORS: gl.constexpr,
    STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Output and natural-log lse of a tile; arguments as of ``triton_forward.forward_kernel``, but tensor maps of keys.

    Grid: tiles · B · Hkv programs. ``heads`` is B · Hkv; those of a ``section`` are taken together, the longest tiles
    of all of them first. A thought comes in ``chunks`` of BOX_T keys. ``scale`` is positive, and in base 2.
    """
    ROWS: gl.constexpr = STEPS * GROUP
    HALF: gl.constexpr = BLOCK_M // 2
    dtype: gl.constexpr = query.dtype.element_ty
    num_rows = num_anchors * ROWS
    num_tiles = gl.cdiv(num_rows, BLOCK_M)
    program = gl.program_id(0)
    first_head = program // (section * num_tiles) * section
    program -= first_head * num_tiles
    together = gl.minimum(section, heads - first_head)
    tile_start = (num_tiles - 1 - program // together) * BLOCK_M
    batch = (first_head + program % together) // kv_heads
    head = (first_head + program % together) % kv_heads

    query += batch.to(gl.int64) * query_stride[0] + (head * GROUP).to(gl.int64) * query_stride[1]
    result = batch.to(gl.int64) * lse_stride[0] + (head * GROUP).to(gl.int64) * lse_stride[1]
    if anchors is not None:
        anchors += batch * anchors_stride
    if order is not None:
        order += batch * anchors_stride
    if thought_lengths is not None:
        thought_lengths += batch * anchors_stride
    if key_start is not None:
        key_start += batch * num_anchors if PER_ANCHOR else batch

    index = tile_start + gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [4], [0]))
    position, step, _, anchor = rows_of(
        index, anchors, thought_lengths, num_rows, length, thought_steps, STEPS, GROUP
    )  # fmt: skip
    first = None
    if key_start is not None or window is not None or step_window is not None:
        first = first_keys(position, step, anchor, key_start, window, step_window, PER_ANCHOR)
    bounds = base_blocks(anchor, first, length, BLOCK_N)
    thought_blocks = chunks * ((GROUP_ANCHORS + THOUGHT_ANCHORS - 1) // THOUGHT_ANCHORS)

    WIDEST: gl.constexpr = max(BLOCK_D, BLOCK_V)
    q_tile = gl.allocate_shared_memory(dtype, [2, HALF, WIDEST], gl.NVMMASharedLayout(128, 16, rank=2))
    row_tile = gl.allocate_shared_memory(gl.int64, [2, HALF], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    key_ring = allocate_ring(dtype, BLOCK_N, BLOCK_D, STAGES, 2)
    value_ring = allocate_ring(dtype, BLOCK_N, BLOCK_V, STAGES, 2)
    turns = mbarrier.allocate_mbarrier(batch=2)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)

    arguments = (
        query, output + result * VALUE_HEAD, lse + result, (anchors, thought_lengths, key_start), order, q_tile,
        row_tile, key_ring, value_ring, turns, query_stride, lse_stride,
        (tile_start, num_rows, length, thought_steps), (window, step_window), thought_blocks, chunks, bounds, scale,
        curve_scale,
    )  # fmt: skip
    OPTIONS: gl.constexpr = (
        STEPS, GROUP, CAUSAL, PER_ANCHOR, HEAD, BLOCK_D, VALUE_HEAD, BLOCK_V, HALF, BLOCK_N, BOX_T, THOUGHT_ANCHORS,
        STAGES,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                _producer,
                (
                    key, value, thought_key, thought_value, key_ring, value_ring, anchors, order, batch, head,
                    tile_start, num_anchors, thought_blocks, chunks, bounds, ROWS, HALF, BOX_T, THOUGHT_ANCHORS,
                    STAGES,
                ),
            ),
            (_consumer_0, (arguments, OPTIONS)),
            (_consumer_1, (arguments, OPTIONS)),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip
