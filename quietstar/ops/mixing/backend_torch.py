"""The ``torch`` backend: elementwise library calls over blocks of rows that stay in the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from quietstar.ops._precision import compute_dtype, widen
from quietstar.ops._rows import BLOCK_BYTES, blocks, rows_within
from quietstar.ops.mixing.backends import CrossEntropy, Mix
from quietstar.ops.mixing.reference import mixed_infinities

Index = tuple[int | slice, ...]


def mix(mix: Mix) -> Tensor:
    """See ``backends.py``."""
    result = torch.empty_like(mix.base, memory_format=torch.contiguous_format)
    for index in _blocks(mix.base):
        result[index] = _mixed(widen(mix.base[index]), widen(mix.thought[index]), mix.weight[index])
    return result


def mix_backward(grad: Tensor, mix: Mix, needs: list[bool]) -> tuple[Tensor | None, ...]:
    """See ``backends.py``."""
    d_base, d_thought, d_weight = _gradients(mix, needs)
    for index in _blocks(mix.base):
        g = widen(grad[index])
        if d_weight is not None:
            d_weight[index] = torch.linalg.vecdot(g, _difference(widen(mix.base[index]), widen(mix.thought[index])))
        _split(g, mix.weight[index], index, d_base, d_thought)
    return d_base, d_thought, d_weight


def cross_entropy(mix: Mix, target: Tensor) -> CrossEntropy:
    """See ``backends.py``."""
    dtype = compute_dtype(mix.base.dtype)
    result = CrossEntropy(*(mix.base.new_empty(target.shape, dtype=dtype) for _ in CrossEntropy._fields))
    nll, slope, largest, log_total = result
    for index in _blocks(mix.base):
        b, t = widen(mix.base[index]), widen(mix.thought[index])
        z, difference = _mixed(b, t, mix.weight[index]), _difference(b, t)
        at_target = target[index][..., None]
        top = z.amax(dim=-1, keepdim=True)
        target_logit = z.sub_(top).gather(-1, at_target).squeeze(-1)
        total = z.exp_().sum(dim=-1)
        largest[index] = top.squeeze(-1)
        log_total[index] = total.log()
        nll[index] = log_total[index] - target_logit
        slope[index] = torch.linalg.vecdot(z, difference) / total - difference.gather(-1, at_target).squeeze(-1)
    return result


def cross_entropy_backward(
    scale: Tensor, mix: Mix, target: Tensor, result: CrossEntropy, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """See ``backends.py``."""
    d_base, d_thought, _ = _gradients(mix, [*needs, False])
    for index in _blocks(mix.base):
        weight, row_scale = mix.weight[index], scale[index][..., None]
        z = _mixed(widen(mix.base[index]), widen(mix.thought[index]), weight)
        z.sub_(result.largest[index][..., None]).sub_(result.log_total[index][..., None])
        g = z.exp_().mul_(row_scale).masked_fill_(row_scale == 0, 0)
        g.scatter_add_(-1, target[index][..., None], -row_scale)
        _split(g, weight, index, d_base, d_thought)
    return d_base, d_thought


def _mixed(base: Tensor, thought: Tensor, mixing_weight: Tensor) -> Tensor:
    """Return the mix of a block in the compute dtype as a new tensor: see ``reference.mixed``."""
    weight = mixing_weight[..., None].to(base.dtype)
    mix = torch.lerp(base, thought, weight)
    if _is_finite(mix):
        return mix
    return torch.where(base.isinf() | thought.isinf(), mixed_infinities(base, thought, weight), mix)


def _difference(base: Tensor, thought: Tensor) -> Tensor:
    """Return thought − base as a new tensor, 0 where either is infinite."""
    difference = thought - base
    return difference if _is_finite(difference) else difference.masked_fill_(base.isinf() | thought.isinf(), 0)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are known to be finite; False where finding out would synchronise with the device."""
    return tensor.device.type == "cpu" and bool(tensor.sum().isfinite())


def _blocks(logits: Tensor) -> Iterator[Index]:
    row_bytes = logits.shape[-1] * compute_dtype(logits.dtype).itemsize
    return blocks(logits.shape[:-1], rows_within(BLOCK_BYTES, row_bytes, logits.device))


def _gradients(mix: Mix, needs: list[bool]) -> list[Tensor | None]:
    """Allocate an uninitialised gradient for every tensor of the mix that needs one; None for the others."""
    dtypes = mix.base.dtype, mix.base.dtype, compute_dtype(mix.base.dtype)
    return [
        mix.base.new_empty(x.shape, dtype=dtype) if needed else None
        for x, dtype, needed in zip(mix, dtypes, needs, strict=True)
    ]


def _split(mixed: Tensor, mixing_weight: Tensor, index: Index, d_base: Tensor | None, d_thought: Tensor | None) -> None:
    """Split the gradient of a block of the mix into those of base and thought."""
    weight = mixing_weight[..., None].to(mixed.dtype)
    if d_base is not None:
        d_base[index] = mixed * (1 - weight)
    if d_thought is not None:
        d_thought[index] = mixed * weight
