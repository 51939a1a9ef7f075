"""The ``cpu`` backend: compiled kernels for the base keys and, merged with what these gave, for the thought keys.

Whatever the dtype, they multiply in float32: without bf16 instructions the library's half-precision products are many
times slower.
"""

import torch
from torch import Tensor

from quietstar.ops._native import _C, DTYPE_CODES, address, unit_columns
from quietstar.ops.thought_attention.backend_torch import blank_inactive
from quietstar.ops.thought_attention.inputs import Inputs, Mask, Result, ResultGradients


def forward(inputs: Inputs, mask: Mask) -> Result:
    """See ``backends.py``."""
    output = torch.empty(inputs.output_shape, dtype=inputs.query.dtype)
    lse = torch.empty(inputs.query.shape[:-1])
    query, key, value, thought_key, thought_value = map(unit_columns, inputs)
    # The merged output goes over that of the base part if it fits, which spares the memory and its page faults.
    base_output = output if output.dtype == torch.float32 else torch.empty(output.shape)
    first, last = _visible_keys(query, key, mask)
    _C.cpu.base_forward(
        *_shape(query, key, mask.scale), address(first), address(last), _steps(query), _base(key), _base(value),
        _steps(base_output), _column(lse),
    )  # fmt: skip
    _C.cpu.thought_forward(
        *_shape(query, thought_key, mask.scale), _steps(query), _steps(thought_key), _steps(thought_value),
        _steps(base_output), _column(lse), _steps(output), _column(lse),
    )  # fmt: skip
    blank_inactive(inputs, mask, output, lse)
    return Result(output, lse)


def backward(gradients: ResultGradients, inputs: Inputs, mask: Mask, result: Result) -> Inputs:
    """See ``backends.py``."""
    grad_output, grad_lse = unit_columns(gradients.output), gradients.lse
    output, lse = unit_columns(result.output), result.lse
    query, key, value, thought_key, thought_value = map(unit_columns, inputs)
    base_grad_query, grad_key, grad_value = (torch.empty(x.shape) for x in (query, key, value))
    grad_thought_key, grad_thought_value = (torch.empty(x.shape, dtype=x.dtype) for x in (thought_key, thought_value))
    grad_query = base_grad_query if query.dtype == torch.float32 else torch.empty(query.shape, dtype=query.dtype)
    first, last = _visible_keys(query, key, mask)
    _C.cpu.base_backward(
        *_shape(query, key, mask.scale), address(first), address(last), _steps(query), _base(key), _base(value),
        _steps(output), _steps(grad_output), _column(lse), _column(grad_lse), _steps(base_grad_query),
        _base(grad_key), _base(grad_value),
    )  # fmt: skip
    _C.cpu.thought_backward(
        *_shape(query, thought_key, mask.scale), _steps(query), _steps(thought_key), _steps(thought_value),
        _steps(output), _steps(grad_output), _steps(base_grad_query), _column(lse), _column(grad_lse),
        _steps(grad_query), _steps(grad_thought_key), _steps(grad_thought_value),
    )  # fmt: skip
    return Inputs(grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_thought_key, grad_thought_value)


def _visible_keys(query: Tensor, key: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """The base keys that each anchor sees, first <= l < last: two int64 [B, P]."""
    last = (mask.anchors_in(key.shape[2], key.device) + 1).expand(query.shape[0], -1).contiguous()
    first = torch.zeros_like(last) if mask.window is None else (last - mask.window).clamp_min_(0)
    if mask.key_start is not None:
        first = torch.maximum(first, mask.key_start)
    return first, last


def _shape(query: Tensor, keys: Tensor, scale: float) -> tuple[int, list[int], float, int]:
    """Dtype, sizes B, Hq, Hkv, P, S, L or T, D, scale and threads."""
    batch, query_heads, num_anchors, steps, head_size = query.shape
    sizes = [batch, query_heads, keys.shape[1], num_anchors, steps, keys.shape[-2], head_size]
    return DTYPE_CODES[query.dtype], sizes, scale, torch.get_num_threads()


def _steps(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Address and strides of a tensor [B, heads, P, steps, D]."""
    return address(tensor), tensor.stride()[:4]


def _base(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Base keys or values [B, heads, L, D] as if every anchor had the L base positions for steps."""
    batch, head, step, _ = tensor.stride()
    return address(tensor), (batch, head, 0, step)


def _column(tensor: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """A tensor [B, heads, P, steps] as one with D = 1; address 0 if it is absent."""
    return (0, (0,) * 4) if tensor is None else (address(tensor), tensor.stride())
