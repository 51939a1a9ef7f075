"""The ``triton`` backend: sorts the anchors, chooses launch parameters and starts the kernels.

``triton_tiles`` draws the layout that all kernels share.
"""

import math

import torch
import triton
from torch import Tensor

from quietstar.ops.thought_attention import triton_launch as launch
from quietstar.ops.thought_attention.inputs import Inputs, Mask, Result, ResultGradients
from quietstar.ops.thought_attention.triton_backward_key import key_gradient_kernel, thought_gradient_kernel
from quietstar.ops.thought_attention.triton_backward_query import query_gradient_kernel
from quietstar.ops.thought_attention.triton_forward import combine_kernel, forward_kernel


def forward(inputs: Inputs, mask: Mask) -> Result:
    """See ``backends.py``."""
    query, key, value, thought_key, thought_value = inputs
    scale = mask.scale
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    batch, query_heads, num_anchors, steps, head_size = query.shape
    kv_heads, length = key.shape[1:3]
    thought_steps = thought_key.shape[3]
    group = query_heads // kv_heads
    num_rows = num_anchors * steps * group

    if scale < 0:
        query, scale = -query, -scale
    query, key, value, thought_key, thought_value = map(_vectors, (query, key, value, thought_key, thought_value))
    tile, splits = launch.forward_launch(query, num_rows, batch * kv_heads, length)
    piece = launch.cut(steps * group, thought_steps, tile)
    # A single tile has nothing to gain from sorted anchors.
    anchors, order = _sorted(mask.anchors) if num_rows > tile.block_m else (mask.anchors, None)
    key_start, window = _first_keys(mask, anchors, order, length)
    result, log_sum = output, lse
    if splits > 1:
        parts = (batch, kv_heads, splits, num_rows)
        result = torch.empty(*parts, head_size, dtype=torch.float32, device=query.device)
        log_sum = torch.empty(parts, dtype=torch.float32, device=query.device)
    sizes = {"STEPS": steps, "GROUP": group, "HEAD": head_size, "BLOCK_D": launch.padded_head(head_size)}
    forward_kernel[(batch * kv_heads * splits * triton.cdiv(num_rows, tile.block_m),)](
        query, key, value, thought_key, thought_value, anchors, order, key_start, result, log_sum,
        query.stride(), key.stride(), value.stride(), thought_key.stride(), thought_value.stride(),
        output.stride(), lse.stride(), _batch_stride(anchors),
        kv_heads, num_anchors, length, thought_steps, window, splits, scale,
        **sizes, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, EDGE_N=launch.edge(tile.block_n),
        BLOCK_T=piece.block_t, PIECE=piece.rows, PIECE_ANCHORS=piece.anchors, SPLIT=splits > 1,
        PER_ANCHOR=_per_anchor(key_start), TILE_ANCHORS=launch.tile_anchors(steps * group, tile), **tile.options(),
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(batch * kv_heads * triton.cdiv(num_rows, 16),)](
            result, log_sum, order, output, lse, output.stride(), lse.stride(), _batch_stride(anchors),
            kv_heads, num_anchors, splits, **sizes, BLOCK_M=16, **tile.options(),
        )  # fmt: skip
    return Result(output, lse)


def backward(gradients: ResultGradients, inputs: Inputs, mask: Mask, result: Result) -> Inputs:
    """See ``backends.py``."""
    query, key, value, thought_key, thought_value = inputs
    grad_output, grad_lse = gradients
    output, lse = result
    scale = mask.scale
    batch, query_heads, num_anchors, steps, head_size = query.shape
    kv_heads, length = key.shape[1:3]
    thought_steps = thought_key.shape[3]
    group = query_heads // kv_heads
    num_rows = num_anchors * steps * group
    heads = batch * kv_heads
    sign = -1 if scale < 0 else 1
    if scale < 0:
        query, scale = -query, -scale
    query, key, value, thought_key, thought_value = map(_vectors, (query, key, value, thought_key, thought_value))
    grad_output, output, lse = _vectors(grad_output), output.contiguous(), lse.contiguous()
    anchors, order = _sorted(mask.anchors)
    key_start, window = _first_keys(mask, anchors, order, length)
    sizes = {"HEAD": head_size, "BLOCK_D": launch.padded_head(head_size)}
    rows = {"STEPS": steps, "GROUP": group}
    units = {"QUERY_UNIT": _unit(query), "GRAD_UNIT": _unit(grad_output)}

    grad_query = torch.empty_like(output)
    grad_thought_key, grad_thought_value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (thought_key, thought_value)
    )
    row_anchor, row_log_sum, row_delta, row_query = (
        torch.empty(heads * num_rows, dtype=dtype, device=query.device)
        for dtype in (torch.int32, torch.float32, torch.float32, _offset_dtype(query))
    )
    row_grad = None
    if grad_output.stride()[1:] != query.stride()[1:]:
        row_grad = torch.empty_like(row_query, dtype=_offset_dtype(grad_output))
    tile = launch.tile_for(launch.QUERY_GRADIENT, query)
    piece = launch.cut(steps * group, thought_steps, tile)
    row_start = torch.empty_like(row_anchor) if _per_anchor(key_start) else None
    query_gradient_kernel[(heads * triton.cdiv(num_rows, tile.block_m),)](
        grad_output, grad_lse, query, key, value, thought_key, thought_value, output, lse, anchors, order,
        key_start,
        grad_query, row_anchor, row_start, row_log_sum, row_delta, row_query, row_grad,
        grad_output.stride(), None if grad_lse is None else grad_lse.stride(), query.stride(), key.stride(),
        value.stride(), thought_key.stride(), thought_value.stride(), output.stride(), lse.stride(),
        _batch_stride(anchors), kv_heads, num_anchors, length, thought_steps, window, scale,
        **rows, **units, **sizes, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, EDGE_N=launch.edge(tile.block_n),
        BLOCK_T=piece.block_t, PIECE=piece.rows, PIECE_ANCHORS=piece.anchors,
        PER_ANCHOR=_per_anchor(key_start), TILE_ANCHORS=launch.tile_anchors(steps * group, tile), **tile.options(),
    )  # fmt: skip

    tile, splits = launch.key_gradient_launch(query, num_rows, heads, length)
    grad_key, grad_value = (
        torch.empty(splits, *key.shape, dtype=key.dtype if splits == 1 else torch.float32, device=key.device)
        for _ in range(2)
    )
    starts, bounds = (None, _bounds(key_start)) if _per_anchor(key_start) else (key_start, None)
    key_gradient_kernel[(heads * splits * triton.cdiv(length, tile.block_n),)](
        grad_output, query, key, value, starts, bounds,
        row_anchor, row_start, row_log_sum, row_delta, row_query, row_grad, grad_key, grad_value,
        grad_output.stride(), query.stride(), key.stride(), value.stride(),
        batch, kv_heads, num_rows, None if bounds is None else steps * group, length, window, splits, scale,
        GROUP=group, **units, **sizes,
        BLOCK_M=tile.block_m, EDGE_M=launch.edge(tile.block_m), BLOCK_N=tile.block_n, **tile.options(),
    )  # fmt: skip

    tile = launch.thought_gradient_tile(query, steps * group, thought_steps)
    groups = triton.cdiv(num_anchors, max(1, tile.block_n // thought_steps))
    thought_gradient_kernel[(heads * groups * triton.cdiv(thought_steps, tile.block_n),)](
        grad_output, query, thought_key, thought_value, order, row_log_sum, row_delta, row_query, row_grad,
        grad_thought_key, grad_thought_value,
        grad_output.stride(), query.stride(), thought_key.stride(), thought_value.stride(),
        grad_thought_key.stride(), _batch_stride(order), kv_heads, num_anchors, thought_steps, scale,
        **rows, **units, **sizes, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.options(),
    )  # fmt: skip
    if sign < 0:
        grad_query.neg_()
    grad_key, grad_value = (x[0] if splits == 1 else x.sum(dim=0).to(key.dtype) for x in (grad_key, grad_value))
    return Inputs(grad_query, grad_key, grad_value, grad_thought_key, grad_thought_value)


def _vectors(tensor: Tensor) -> Tensor:
    """The tensor with elements of its last dimension side by side: itself, unless its strides are unusual."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _first_keys(
    mask: Mask, anchors: Tensor | None, order: Tensor | None, length: int
) -> tuple[Tensor | None, int | None]:  # fmt: skip
    """``key_start`` and ``window`` as kernels take them, given anchors in their order. The first is contiguous.

    Those of anchors, [B, P], account for the window, too.
    """
    key_start = mask.key_start
    if key_start is None:
        return None, mask.window
    if key_start.shape[1] == 1:
        return key_start[:, 0], mask.window
    if order is not None:
        key_start = key_start.gather(1, order.expand(key_start.shape))
    if mask.window is not None:
        anchors = torch.arange(length, device=key_start.device) if anchors is None else anchors
        key_start = key_start.maximum(anchors - (mask.window - 1))
    return key_start.contiguous(), None


def _per_anchor(key_start: Tensor | None) -> bool:
    """Whether anchors have first base keys of their own."""
    return key_start is not None and key_start.dim() == 2


def _bounds(key_start: Tensor) -> Tensor:
    """The largest so far along [B, P], and the smallest from there on: [2, B, P]."""
    return torch.stack((key_start.cummax(1).values, key_start.flip(1).cummin(1).values.flip(1)))


def _sorted(anchors: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Anchors in ascending order, and at which place of the caller each is; no anchors are 0..L−1."""
    if anchors is None:
        return None, None
    return torch.sort(anchors, dim=-1, stable=True)


def _batch_stride(anchors: Tensor | None) -> int:
    return anchors.stride(0) if anchors is not None and len(anchors) > 1 else 0


def _unit(rows: Tensor) -> int:
    """In how many elements, at most 16, the offset of every row within a batch and head can be counted."""
    return math.gcd(16, *rows.stride()[1:4])


def _offset_dtype(rows: Tensor) -> torch.dtype:
    """The dtype that these counts fit."""
    largest = sum((size - 1) * stride for size, stride in zip(rows.shape[1:4], rows.stride()[1:4], strict=True))
    return torch.int32 if largest // _unit(rows) < 2**31 else torch.int64
