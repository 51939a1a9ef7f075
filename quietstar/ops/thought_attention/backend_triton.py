"""The ``triton`` backend: sorts the anchors, chooses launch parameters and launches the kernels.

``triton_tiles`` describes the layout that all kernels share.
"""

import math
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from quietstar.ops.thought_attention import gluon_launch
from quietstar.ops.thought_attention import triton_launch as launch
from quietstar.ops.thought_attention.inputs import Inputs, Mask, Result, ResultGradients
from quietstar.ops.thought_attention.triton_backward_key import key_gradient_kernel, thought_gradient_kernel
from quietstar.ops.thought_attention.triton_backward_query import query_gradient_kernel
from quietstar.ops.thought_attention.triton_forward import combine_kernel, forward_kernel

# Softcaps are clamped to this range, which leaves the tanh unchanged in float32 but avoids overflow and underflow.
_SOFTCAPS = 1e-28, 1e28


def forward(inputs: Inputs, mask: Mask) -> Result:
    """See ``backends.py``."""
    query = inputs.query
    batch, _, num_anchors, steps, _ = query.shape
    kv_heads, length = inputs.key.shape[1:3]
    thought_steps, group = inputs.thought_steps, inputs.group
    num_rows = num_anchors * steps * group
    output = torch.empty(inputs.output_shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)

    vectors, scale, curve_scale = _vectors_and_scales(inputs, mask)
    tile, programs = launch.forward_launch(_widest(inputs), num_rows, batch * kv_heads, length)
    # A single tile gains nothing from sorted anchors.
    seen = _Seen.of(inputs, mask, in_order=num_rows > tile.block_m)
    if programs.splits == 1 and num_rows >= gluon_launch.LEAST_ROWS and gluon_launch.unavailable(vectors, mask) is None:
        gluon_launch.forward(vectors, mask, seen, scale, curve_scale, Result(output, lse))
        return Result(output, lse)
    result, log_sum = output, lse
    if programs.splits > 1:
        parts = (batch, kv_heads, programs.splits, num_rows)
        result = torch.empty(*parts, inputs.value.shape[-1], dtype=torch.float32, device=query.device)
        log_sum = torch.empty(parts, dtype=torch.float32, device=query.device)
    rows, heads = {"STEPS": steps, "GROUP": group}, _head_sizes(inputs)
    forward_kernel[programs.grid](
        *vectors, seen.anchors, seen.order, seen.thought_lengths, seen.key_start, result, log_sum,
        *(x.stride() for x in vectors), lse.stride(), seen.batch_stride,
        kv_heads, num_anchors, length, thought_steps, seen.window, seen.step_window, programs.splits, programs.together,
        scale, curve_scale, **rows, CAUSAL=mask.causal, **heads, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        EDGE_N=launch.edge(tile.block_n), **launch.diagonal(steps * group, thought_steps, tile).sizes(),
        SPLIT=programs.splits > 1, PER_ANCHOR=seen.start_per_anchor,
        TILE_ANCHORS=launch.tile_anchors(steps * group, tile), **tile.options(),
    )  # fmt: skip
    if programs.splits > 1:
        heads = {name: heads[name] for name in ("VALUE_HEAD", "BLOCK_V")}
        combine_kernel[(batch * kv_heads * triton.cdiv(num_rows, 16),)](
            result, log_sum, seen.order, output, lse, lse.stride(), seen.batch_stride,
            kv_heads, num_anchors, programs.splits, **rows, **heads, BLOCK_M=16, **tile.options(),
        )  # fmt: skip
    return Result(output, lse)


def backward(gradients: ResultGradients, inputs: Inputs, mask: Mask, result: Result) -> Inputs:
    """See ``backends.py``."""
    batch, _, num_anchors, steps, _ = inputs.query.shape
    kv_heads, length = inputs.key.shape[1:3]
    thought_steps, group = inputs.thought_steps, inputs.group
    num_rows = num_anchors * steps * group
    heads = batch * kv_heads
    device = inputs.query.device

    vectors, scale, curve_scale = _vectors_and_scales(inputs, mask)
    query, key, value, thought_key, thought_value = vectors
    grad_output, grad_lse = _side_by_side(gradients.output), gradients.lse
    output, lse = (x.contiguous() for x in result)
    seen = _Seen.of(inputs, mask)
    anchor_rows = seen.anchor_rows(inputs)
    sizes, rows = _head_sizes(inputs), {"STEPS": steps, "GROUP": group, "CAUSAL": mask.causal}
    units = {"QUERY_UNIT": _offset_unit(query), "GRAD_UNIT": _offset_unit(grad_output)}

    grad_query, grad_thought_key, grad_thought_value = (
        torch.empty(x.shape, dtype=x.dtype, device=device) for x in (query, thought_key, thought_value)
    )
    row_anchor, row_log_sum, row_delta, row_query = (
        torch.empty(heads * num_rows, dtype=dtype, device=device)
        for dtype in (torch.int32, torch.float32, torch.float32, _offset_dtype(query))
    )
    row_start = torch.empty_like(row_anchor) if seen.start_per_row else None
    if seen.anchors is None:  # the anchor follows from a row's number
        row_anchor = None
    row_grad = None
    if grad_output.stride()[1:] != query.stride()[1:]:
        row_grad = torch.empty_like(row_query, dtype=_offset_dtype(grad_output))
    arguments = (
        grad_output, grad_lse, *vectors, output, lse, seen.anchors, seen.order, seen.thought_lengths, seen.key_start,
        anchor_rows,
        grad_query, row_anchor, row_start, row_log_sum, row_delta, row_query, row_grad,
        grad_output.stride(), None if grad_lse is None else grad_lse.stride(), *(x.stride() for x in vectors),
        lse.stride(), seen.batch_stride,
        kv_heads, num_anchors, length, thought_steps, seen.window, seen.step_window, scale, curve_scale,
    )  # fmt: skip
    gluon = _gluon_query_gradient(vectors, mask)
    if gluon is not None:
        gluon.launch(arguments, vectors, **rows, **units, PER_ANCHOR=seen.start_per_anchor)
    else:
        tile, programs = launch.query_gradient_launch(_widest(inputs), num_rows, heads, length)
        query_gradient_kernel[programs.grid](
            *arguments, programs.together, **rows, **units, **sizes,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, EDGE_N=launch.edge(tile.block_n),
            **launch.diagonal(steps * group, thought_steps, tile).sizes(), PER_ANCHOR=seen.start_per_anchor,
            TILE_ANCHORS=launch.tile_anchors(steps * group, tile), **tile.options(),
        )  # fmt: skip

    tile, programs = launch.key_gradient_launch(_widest(inputs), num_rows, heads, length)
    grad_key, grad_value = (
        torch.empty(programs.splits, *x.shape, dtype=x.dtype if programs.splits == 1 else torch.float32, device=device)
        for x in (key, value)
    )
    bounds = seen.start_bounds(inputs, mask)
    key_start = None if seen.start_per_row else seen.key_start
    gluon, in_order = _gluon_key_gradient(grad_output, vectors, mask), None
    if gluon is not None:
        in_order = seen.in_order()
        gluon.launch(
            grad_output, query, key, value, in_order, key_start, bounds, row_anchor, row_start,
            row_log_sum, row_delta, grad_key, grad_value, seen.window, programs, scale,
        )  # fmt: skip
    if gluon is None or in_order is not None:
        key_gradient_kernel[programs.grid](
            grad_output, query, key, value, in_order, key_start, bounds, anchor_rows,
            row_anchor, row_start, row_log_sum, row_delta, row_query, row_grad, grad_key, grad_value,
            grad_output.stride(), query.stride(), key.stride(), value.stride(),
            batch, kv_heads, num_rows, None if bounds is None else steps * group, length, seen.window,
            programs.splits, programs.together, scale, curve_scale, GROUP=group,
            ROWS=steps * group if row_anchor is None else None, **units, **sizes,
            BLOCK_M=tile.block_m, EDGE_M=launch.edge(tile.block_m), BLOCK_N=tile.block_n, **tile.options(),
        )  # fmt: skip

    tile, together = launch.thought_gradient_launch(_widest(inputs), steps * group, thought_steps)
    groups = triton.cdiv(num_anchors, together)
    thought_gradient_kernel[(heads * groups * triton.cdiv(thought_steps, tile.block_n),)](
        grad_output, query, thought_key, thought_value, seen.order, seen.thought_lengths, anchor_rows,
        row_log_sum, row_delta, row_query, row_grad, grad_thought_key, grad_thought_value,
        grad_output.stride(), query.stride(), thought_key.stride(), thought_value.stride(), seen.batch_stride,
        kv_heads, num_anchors, thought_steps, together, seen.step_window, scale, curve_scale,
        **rows, **units, **sizes, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.options(),
    )  # fmt: skip
    if mask.scale < 0:
        grad_query.neg_()
    if programs.splits > 1:
        grad_key, grad_value = (x.sum(dim=0, keepdim=True).to(key.dtype) for x in (grad_key, grad_value))
    return Inputs(grad_query, grad_key[0], grad_value[0], grad_thought_key, grad_thought_value)


class _Seen(NamedTuple):
    """Which keys rows see, in the form that kernels take: all per-anchor tensors in one order, and contiguous."""

    anchors: Tensor | None
    """[1 or B, P], −1 also for thoughts without a query. None means 0..L−1."""
    order: Tensor | None
    """Like anchors: the caller's index of each."""
    thought_lengths: Tensor | None
    """Like anchors, which are not None then."""
    key_start: Tensor | None
    """[B], or [B, P], which then includes the window from the anchor."""
    window: int | None
    step_window: int | None
    """The window if it is measured from the step."""

    @classmethod
    def of(cls, inputs: Inputs, mask: Mask, in_order: bool = True) -> "_Seen":
        """Create it from a mask; with ``in_order``, anchors are sorted in ascending order."""
        anchors, lengths, order = mask.anchors, mask.thought_lengths, None
        if lengths is not None:
            anchors = mask.anchors_in(inputs.key.shape[2], lengths.device)
            anchors = torch.where(lengths > inputs.thought_steps - inputs.steps, anchors, -1)
            lengths = lengths.expand(anchors.shape)
        if in_order and anchors is not None:
            anchors, order = torch.sort(anchors, dim=-1, stable=True)
        if lengths is not None:
            lengths = lengths.contiguous() if order is None else lengths.gather(1, order)

        key_start, window, step_window = mask.key_start, mask.window, None
        if mask.window_from_step:
            window, step_window = None, mask.window
        if key_start is not None and key_start.shape[1] == 1:
            key_start = key_start[:, 0]
        elif key_start is not None:
            if order is not None:
                key_start = key_start.gather(1, order.expand(key_start.shape))
            if window is not None:
                positions = torch.arange(inputs.key.shape[2], device=key_start.device) if anchors is None else anchors
                key_start, window = key_start.maximum(positions - (window - 1)), None
            key_start = key_start.contiguous()
        return cls(anchors, order, lengths, key_start, window, step_window)

    @property
    def batch_stride(self) -> int:
        """The batch stride of all tensors like anchors."""
        return self.anchors.stride(0) if self.anchors is not None and len(self.anchors) > 1 else 0

    @property
    def start_per_anchor(self) -> bool:
        """Whether ``key_start`` differs between anchors."""
        return self.key_start is not None and self.key_start.dim() == 2

    @property
    def start_per_row(self) -> bool:
        """Whether the first base key may differ between rows."""
        return self.start_per_anchor or self.step_window is not None

    def in_order(self) -> Tensor | None:
        """int32 on the device: 1 if the caller's anchors have this order, else 0; None if they always have."""
        if self.order is None:
            return None
        return (self.order == torch.arange(self.order.shape[-1], device=self.order.device)).all().to(torch.int32)

    def start_bounds(self, inputs: Inputs, mask: Mask) -> Tensor | None:
        """Bounds [2, B, P] on the rows' first base keys: the largest up to each anchor, the smallest from it on."""
        if not self.start_per_row:
            return None
        first = last = self.key_start
        if self.step_window is not None:
            positions = torch.arange(inputs.key.shape[2], device=inputs.key.device)[None]
            positions = positions if self.anchors is None else self.anchors
            window = positions + mask.window_offset(inputs.steps, inputs.thought_steps) + 1 - self.step_window
            first, last = window, window + inputs.steps - 1
            if self.key_start is not None:
                start = self.key_start if self.start_per_anchor else self.key_start[:, None]
                first, last = first.maximum(start), last.maximum(start)
        first, last = (x.expand(len(inputs.key), -1) for x in (first, last))
        return torch.stack((last.cummax(1).values, first.flip(1).cummin(1).values.flip(1)))

    def anchor_rows(self, inputs: Inputs) -> Tensor | None:
        """See ``triton_tiles.table_rows``; int32 [B, P + 1], None without lengths."""
        if self.thought_lengths is None:
            return None
        batch, _, num_anchors, steps, _ = inputs.query.shape
        own = self.thought_lengths - (inputs.thought_steps - steps)
        ends = torch.where(self.anchors < 0, 0, own).cumsum(1)
        missing = num_anchors * steps - ends[:, -1:]
        rows = torch.cat((missing, missing + ends), dim=1) * inputs.group
        return rows.to(torch.int32).expand(batch, -1).contiguous()


def _gluon_query_gradient(vectors: Inputs, mask: Mask) -> ModuleType | None:
    """Return the module that launches the query gradient's Gluon kernel, if it can run."""
    if gluon_launch.unavailable(vectors, mask) is not None:
        return None
    from quietstar.ops.thought_attention import gluon_backward_query  # older versions of Triton cannot import it

    return gluon_backward_query if gluon_launch.gradients_unavailable(vectors.query, vectors.value) is None else None


def _gluon_key_gradient(grad_output: Tensor, vectors: Inputs, mask: Mask) -> ModuleType | None:
    """Return the module whose Gluon kernel replaces ``key_gradient_kernel``, if it can run."""
    if gluon_launch.unavailable(vectors, mask) is not None:
        return None
    from quietstar.ops.thought_attention import gluon_backward_key  # older versions of Triton cannot import it

    reason = gluon_backward_key.unavailable(grad_output, vectors.query, vectors.key, mask)
    return gluon_backward_key if reason is None else None


def _vectors_and_scales(inputs: Inputs, mask: Mask) -> tuple[Inputs, float, float | None]:
    """Return inputs, ``scale`` and ``curve_scale`` as kernels take them (see ``triton_tiles``), never negative."""
    if mask.scale < 0:
        inputs = inputs._replace(query=-inputs.query)
    vectors, scale = Inputs(*map(_side_by_side, inputs)), abs(mask.scale)
    if mask.softcap is None:
        return vectors, scale, None
    softcap = min(max(mask.softcap, _SOFTCAPS[0]), _SOFTCAPS[1])
    return vectors, softcap, min(scale / softcap, 1e37)


def _side_by_side(tensor: Tensor) -> Tensor:
    """Return the tensor with unit stride in the last dimension, copied only if necessary."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _head_sizes(inputs: Inputs) -> dict[str, int]:
    """Return the head sizes of queries and keys, and of values, and their padded sizes in tiles."""
    head, value_head = inputs.key.shape[-1], inputs.value.shape[-1]
    return {
        "HEAD": head, "BLOCK_D": launch.padded_head(head),
        "VALUE_HEAD": value_head, "BLOCK_V": launch.padded_head(value_head),
    }  # fmt: skip


def _widest(inputs: Inputs) -> Tensor:
    """Return the tensor with the larger head size, for which launch parameters are chosen."""
    return max(inputs.query, inputs.value, key=lambda x: x.shape[-1])


def _offset_unit(rows: Tensor) -> int:
    """Return the largest unit, of at most 16 elements, that divides the offset of every row in a batch and head."""
    return math.gcd(16, *rows.stride()[1:4])


def _offset_dtype(rows: Tensor) -> torch.dtype:
    """Return the dtype that holds these offsets, counted in units."""
    largest = sum((size - 1) * stride for size, stride in zip(rows.shape[1:4], rows.stride()[1:4], strict=True))
    return torch.int32 if largest // _offset_unit(rows) < 2**31 else torch.int64
