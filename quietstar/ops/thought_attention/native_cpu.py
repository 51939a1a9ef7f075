"""The ``cpu`` backend: library flash attention on the base keys, in float32, merged with the diagonal part in one pass.

Base and diagonal part are those of ``library.py``. Half precision is widened for the base part, because without
bf16 instructions the library's half-precision products are many times slower than those of float32.
"""

import torch
from torch import Tensor

from quietstar.ops._native import _C, DTYPE_CODES, address, unit_columns
from quietstar.ops._precision import widen
from quietstar.ops.thought_attention import library


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thought_key: Tensor,
    thought_value: Tensor,
    anchors: Tensor | None,
    key_start: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, P, S, D] in the dtype of ``query`` and lse [B, Hq, P, S] in float32."""
    base_output, base_lse = library.base_forward(*map(widen, (query, key, value)), anchors, key_start, window, scale)
    output, lse = _room_for_result(base_output, query.dtype), _room_for_result(base_lse, torch.float32)
    if output.numel():
        given = (query, thought_key, thought_value, base_output, base_lse[..., None], output, lse[..., None])
        given = [unit_columns(x) for x in given]
        _C.cpu.thought_forward(*_shape(query, thought_key, scale), *map(_steps, given))
    library.blank_inactive(anchors, output, lse)
    return output, lse


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thought_key: Tensor,
    thought_value: Tensor,
    output: Tensor,
    lse: Tensor,
    anchors: Tensor | None,
    key_start: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, thought_key and thought_value, in that order."""
    base_grad_query, grad_key, grad_value = library.base_backward(
        widen(grad_output), grad_lse, *map(widen, (query, key, value, output)), lse, anchors, key_start, window, scale
    )
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (thought_key, thought_value)]
    grads.insert(0, _room_for_result(base_grad_query, query.dtype))
    if query.numel():
        lse, grad_lse = lse[..., None], None if grad_lse is None else grad_lse[..., None]
        given = (query, thought_key, thought_value, output, grad_output, base_grad_query, lse, grad_lse, *grads)
        given = [None if x is None else unit_columns(x) for x in given]
        _C.cpu.thought_backward(*_shape(query, thought_key, scale), *map(_steps, given))
    return grads[0], grad_key.to(key.dtype), grad_value.to(value.dtype), *grads[1:]


def _room_for_result(base: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the merged result goes: over the base part if it fits, which spares the memory and its page faults."""
    return base if base.dtype == dtype and base.is_contiguous() else torch.empty(base.shape, dtype=dtype)


def _shape(query: Tensor, thought_key: Tensor, scale: float) -> tuple[int, list[int], float, int]:
    """Dtype, sizes B, Hq, Hkv, P, S, T, D, scale and threads."""
    batch, query_heads, num_anchors, steps, head_size = query.shape
    kv_heads, thought_steps = thought_key.shape[1], thought_key.shape[3]
    sizes = [batch, query_heads, kv_heads, num_anchors, steps, thought_steps, head_size]
    return DTYPE_CODES[query.dtype], sizes, scale, torch.get_num_threads()


def _steps(tensor: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Address and strides of a tensor [B, heads, P, steps, D]; address 0 for one that is absent."""
    return (0, (0,) * 4) if tensor is None else (address(tensor), tensor.stride()[:4])
