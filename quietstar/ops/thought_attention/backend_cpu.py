"""The ``cpu`` backend: one compiled kernel for the base keys, and one for the thought keys that merges both results.

They multiply in float32 whatever the dtype: without bf16 instructions, the library's half-precision products are many
times slower.
"""

import torch
from torch import Tensor

from quietstar.ops._native import _C, DTYPE_CODES, address, unit_columns
from quietstar.ops.thought_attention.inputs import Inputs, Mask, Result, ResultGradients


def forward(inputs: Inputs, mask: Mask) -> Result:
    """See ``backends.py``."""
    output = torch.empty(inputs.output_shape, dtype=inputs.query.dtype)
    lse = torch.empty(inputs.query.shape[:-1])
    # The merged output overwrites that of the base part if it fits, which saves the memory and its page faults.
    base_output = output if output.dtype == torch.float32 else torch.empty(output.shape)
    inputs = Inputs(*map(unit_columns, inputs))
    tensors = {"output": _steps(output), "lse": _column(lse), "base_output": _steps(base_output)}
    _C.cpu.thought_attention(*_call(inputs, mask), _described(inputs) | tensors, torch.get_num_threads())
    return Result(output, lse)


def backward(gradients: ResultGradients, inputs: Inputs, mask: Mask, result: Result) -> Inputs:
    """See ``backends.py``."""
    inputs = Inputs(*map(unit_columns, inputs))
    output, grad_output = unit_columns(result.output), unit_columns(gradients.output)
    dtype = inputs.query.dtype
    dtypes = dtype, torch.float32, torch.float32, dtype, dtype  # base gradients are summed over blocks of anchors
    grads = Inputs(*(torch.empty(x.shape, dtype=wanted) for x, wanted in zip(inputs, dtypes, strict=True)))
    base_grad_query = grads.query if dtype == torch.float32 else torch.empty(grads.query.shape)
    tensors = {
        "output": _steps(output), "grad_output": _steps(grad_output), "lse": _column(result.lse),
        "grad_lse": _column(gradients.lse), "base_grad_query": _steps(base_grad_query),
    }  # fmt: skip
    tensors |= {f"grad_{name}": tensor for name, tensor in _described(grads).items()}
    _C.cpu.thought_attention_backward(*_call(inputs, mask), _described(inputs) | tensors, torch.get_num_threads())
    return Inputs(*(grad.to(dtype) for grad in grads))


def _call(inputs: Inputs, mask: Mask) -> tuple[int, list[int], tuple]:
    """Return dtype, sizes and mask as the kernels take them."""
    indices = ((address(x), strides) for x, strides in mask.per_anchor(inputs))
    return DTYPE_CODES[inputs.query.dtype], inputs.sizes, (*indices, *mask.native_numbers)


def _described(inputs: Inputs) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return the address and strides of every input, by name."""
    base = {"key": _base(inputs.key), "value": _base(inputs.value)}
    return {name: _steps(tensor) for name, tensor in inputs._asdict().items() if name not in base} | base


def _steps(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Return the address and strides of a tensor [B, heads, P, steps, D]."""
    return address(tensor), tensor.stride()[:4]


def _base(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Describe base keys or values [B, heads, L, D] as if every anchor had the L base positions as its steps."""
    batch, head, step, _ = tensor.stride()
    return address(tensor), (batch, head, 0, step)


def _column(tensor: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Describe a tensor [B, heads, P, steps] as one with D = 1; address 0 if it is absent."""
    return (0, (0,) * 4) if tensor is None else (address(tensor), tensor.stride())
