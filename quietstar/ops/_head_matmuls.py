"""The three matmuls of a vocabulary head, with float32 results whatever the dtype of hidden states and weight.

On CUDA the matrix units multiply half-precision operands into float32. On a CPU half-precision operands are widened,
the weight in blocks: float32 matmuls are both exact in the products and, without bf16 instructions, about ten times
faster than the library's half-precision ones.
"""

import torch
from torch import Tensor

from quietstar.ops._precision import compute_dtype
from quietstar.ops._rows import slices

# Rows of the weight widened at a time on a CPU: at hidden size 4096 this is 16 MiB.
_WIDENED_ROWS = 1024


def _vocabulary_blocks(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    rows = weight.shape[0]
    return list(slices(rows, rows if weight.dtype == dtype else _WIDENED_ROWS)) if rows else []


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """Write out[r, v] = hidden[r] . weight[v]; out [rows, V] in float32 (float64 for float64)."""
    if out.is_cuda and hidden.dtype != out.dtype:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        return
    hidden = hidden.to(out.dtype)
    for part in _vocabulary_blocks(weight, out.dtype):
        torch.mm(hidden, weight[part].to(out.dtype).t(), out=out[:, part])


def hidden_gradient(d_logits: Tensor, weight: Tensor) -> Tensor:
    """d_logits @ weight, [rows, H] in float32 (float64 for float64)."""
    if d_logits.dtype == weight.dtype and d_logits.dtype.itemsize < 4:
        return torch.mm(d_logits, weight, out_dtype=torch.float32)
    first, *others = _vocabulary_blocks(weight, d_logits.dtype)
    result = torch.mm(d_logits[:, first], weight[first].to(d_logits.dtype))
    for part in others:
        result.addmm_(d_logits[:, part], weight[part].to(d_logits.dtype))
    return result


def weight_gradient_dtype(weight: Tensor) -> torch.dtype:
    """In which d weight is handed out: on a GPU bfloat16 for a weight of it, else float32 (float64 for float64).

    Of float16 the range would not do: sums over rows are scaled to size only when the incoming gradient is known. A CPU
    makes the sums in float32 anyway.
    """
    return torch.bfloat16 if weight.is_cuda and weight.dtype == torch.bfloat16 else compute_dtype(weight.dtype)


def add_weight_gradient(total: Tensor | None, d_logits: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """``total`` plus d_logits^T @ hidden, [V, H], in place unless total is None.

    ``dtype`` is float32 (float64 for float64) or, of a product that nothing is added to, that of d_logits: then the
    matmul itself rounds its sums.
    """
    if d_logits.dtype == dtype:
        hidden = hidden.to(dtype)
        return torch.mm(d_logits.t(), hidden) if total is None else total.addmm_(d_logits.t(), hidden)
    if total is None:
        return torch.mm(d_logits.t(), hidden, out_dtype=dtype)
    return torch.addmm(total, d_logits.t(), hidden, out_dtype=dtype, out=total)
