"""PyTorch's flash attention kernels on the base part, with anchors 0..n−1, each repeated ``repeats`` times.

Rows are folded so that the library sees ordinary causal attention: query [B·Hq, repeats·S, n, D] (steps and repeats
are heads, positions are rows) against one key/value head per query head, expanded over the folded heads.

On a CPU, float16 inputs are computed in float32: the float16 kernel takes several times as long and may overflow.
"""

import torch
from torch import Tensor

_aten = torch.ops.aten

# Half-precision elements in 16 bytes, the unit in which the CUDA kernels read.
_ALIGNMENT = 8


def supports(query: Tensor, scale: float) -> bool:
    """Whether a library kernel with a log-sum-exp output supports this device, dtype, head size and scale.

    The library's low-level function checks little of this itself.
    """
    # The kernels mask before they scale: −inf · 0 would be NaN, and −inf times a negative scale a visible key.
    if scale < torch.finfo(torch.float32).tiny:
        return False
    if query.device.type == "cpu":
        return True
    if query.device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    capability = torch.cuda.get_device_capability(query.device)
    small = (8, 6) <= capability < (9, 0) or capability >= (12, 0)  # little shared memory: no backward for large heads
    return (
        capability >= (8, 0)
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % _ALIGNMENT == 0
        and query.shape[-1] <= (192 if small else 256)
    )


def forward(query: Tensor, key: Tensor, value: Tensor, repeats: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every row over base keys 0..anchor: output [B, Hq, P, S, D], maybe wider, and lse [B, Hq, P, S]."""
    folded = _fold(_readable(query), repeats), *_expand(query, key, value, repeats)
    if query.device.type == "cpu":
        output, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*folded, is_causal=True, scale=scale)
    else:
        output, lse = _aten._scaled_dot_product_flash_attention(*folded, is_causal=True, scale=scale)[:2]
    return _unfold(output, query), _unfold(lse, query)


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    repeats: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query (maybe wider), key and value through the base part, given the *merged* output and lse."""
    folded = _fold(_readable(query), repeats), *_expand(query, key, value, repeats)
    grad, merged, log_sum = (_fold(x, repeats) for x in (_readable(grad_output), _readable(output), lse))
    positions = merged.shape[2]
    if query.device.type == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *folded, merged, log_sum, 0.0, True, scale=scale
        )
    else:
        empty = torch.empty(0, dtype=torch.int64, device=query.device)
        grads = _aten._scaled_dot_product_flash_attention_backward(
            grad, *folded, merged, log_sum.contiguous(), None, None, positions, positions, 0.0, True, empty, empty,
            scale=scale,
        )  # fmt: skip
    grad_query, grad_key, grad_value = grads
    return _unfold(grad_query, query), _reduce(grad_key, key), _reduce(grad_value, value)


def _taken(tensor: Tensor) -> Tensor:
    """Convert the tensor to the dtype that the kernels compute in."""
    return tensor.float() if tensor.device.type == "cpu" and tensor.dtype == torch.float16 else tensor


def _readable(rows: Tensor) -> Tensor:
    """Copy the rows, if needed, to a layout that the kernels accept: unit last stride, no overlap, aligned vectors.

    The CPU kernel assumes a last stride of 1 without checking, and its matrix products accept no overlapping rows.
    """
    rows = _taken(rows)
    *outer, last = rows.stride()
    apart = all(
        size == 1 or (stride >= rows.shape[-1] and (rows.device.type == "cpu" or stride % _ALIGNMENT == 0))
        for size, stride in zip(rows.shape, outer, strict=False)
    )
    aligned = rows.device.type == "cpu" or rows.data_ptr() % 16 == 0
    return rows if last == 1 and apart and aligned else rows.contiguous()


def _fold(rows: Tensor, repeats: int) -> Tensor:
    """[B, Hq, n·repeats, S, ...] -> [B·Hq, repeats·S, n, ...]."""
    return rows.flatten(0, 1).unflatten(1, (-1, repeats)).flatten(2, 3).transpose(1, 2)


def _unfold(folded: Tensor, query: Tensor) -> Tensor:
    """The inverse of ``_fold``."""
    return folded.transpose(1, 2).reshape(query.shape[: folded.dim() + 1])


def _expand(query: Tensor, key: Tensor, value: Tensor, repeats: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values that anchors 0..n−1 can see, one head per query head, expanded over the folded heads.

    They are always copies, whatever the strides of the given tensors.
    """
    positions, folded_heads = query.shape[2] // repeats, repeats * query.shape[3]
    group = query.shape[1] // key.shape[1]
    return tuple(
        x[:, :, :positions].repeat_interleave(group, dim=1).flatten(0, 1)[:, None].expand(-1, folded_heads, -1, -1)
        for x in map(_taken, (key, value))
    )


def _reduce(grad: Tensor, base: Tensor) -> Tensor:
    """Sum [B·Hq, repeats·S, n, D] over the folded heads and the group: [B, Hkv, L, D], zero from position n on."""
    batch, kv_heads, length, _ = base.shape
    total = grad.sum(dim=1, dtype=torch.promote_types(grad.dtype, torch.float32))
    total = total.unflatten(0, (batch, kv_heads, -1)).sum(dim=2).to(base.dtype)
    return torch.nn.functional.pad(total, (0, 0, 0, length - total.shape[2]))
