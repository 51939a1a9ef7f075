"""The three matmuls of a vocabulary head, with float32 results whatever the dtype of hidden states and weight.

On CUDA, tensor cores multiply half-precision operands with float32 results. On a CPU, half-precision operands are
widened, the weight in blocks: float32 products of them are exact, and without bf16 instructions about ten times faster
than the library's half-precision ones.
"""

import torch
from torch import Tensor

from quietstar.ops._precision import compute_dtype
from quietstar.ops._rows import slices

# Rows of the weight widened at a time on a CPU: 16 MiB at hidden size 4096.
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
    """Compute d_logits @ weight, [rows, H] in float32 (float64 for float64)."""
    if d_logits.dtype == weight.dtype and d_logits.dtype.itemsize < 4:
        return torch.mm(d_logits, weight, out_dtype=torch.float32)
    first, *others = _vocabulary_blocks(weight, d_logits.dtype)
    result = torch.mm(d_logits[:, first], weight[first].to(d_logits.dtype))
    for part in others:
        result.addmm_(d_logits[:, part], weight[part].to(d_logits.dtype))
    return result


def weight_gradient_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which d weight is returned: bfloat16 for a bfloat16 weight on a GPU, else float32 (or float64).

    The range of float16 is too small, since sums over rows are scaled only once the incoming gradient is known. A CPU
    computes the sums in float32 anyway.
    """
    return torch.bfloat16 if weight.is_cuda and weight.dtype == torch.bfloat16 else compute_dtype(weight.dtype)


def add_weight_gradient(total: Tensor | None, d_logits: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``total`` + d_logits^T @ hidden, [V, H], added in place unless ``total`` is None.

    ``dtype`` is float32 (float64 for float64). If ``total`` is None it may also be that of d_logits; then the matmul
    itself rounds its sums.
    """
    if d_logits.dtype == dtype:
        hidden = hidden.to(dtype)
        return torch.mm(d_logits.t(), hidden) if total is None else total.addmm_(d_logits.t(), hidden)
    if total is None:
        return torch.mm(d_logits.t(), hidden, out_dtype=dtype)
    return torch.addmm(total, d_logits.t(), hidden, out_dtype=dtype, out=total)
