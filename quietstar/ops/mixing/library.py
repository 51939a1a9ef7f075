"""The ``torch`` backend: elementwise library calls over blocks of rows that stay in the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from quietstar.ops._precision import compute_dtype, widen
from quietstar.ops._rows import BLOCK_BYTES, blocks, rows_within
from quietstar.ops.mixing.reference import mixed_infinities

Index = tuple[int | slice, ...]


def mix(base: Tensor, thought: Tensor, mixing_weight: Tensor) -> Tensor:
    """(1 − w) · base + w · thought, computed in the compute dtype, in the dtype of the logits."""
    result = torch.empty_like(base, memory_format=torch.contiguous_format)
    for index in _blocks(base):
        result[index] = _mixed(widen(base[index]), widen(thought[index]), mixing_weight[index])
    return result


def mix_backward(
    grad: Tensor, base: Tensor, thought: Tensor, mixing_weight: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of base, thought and, in the compute dtype, of the mixing weight; None where not needed."""
    d_base, d_thought, d_weight = _gradients(base, thought, needs)
    for index in _blocks(base):
        g = widen(grad[index])
        if d_weight is not None:
            d_weight[index] = torch.linalg.vecdot(g, _difference(widen(base[index]), widen(thought[index])))
        _split(g, mixing_weight[index], index, d_base, d_thought)
    return d_base, d_thought, d_weight


def cross_entropy(
    base: Tensor, thought: Tensor, mixing_weight: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four tensors [...] in the compute dtype, from one pass over the logits.

    ``target`` [...] is int64, all in [0, V).

    Returns:
        nll; its derivative by the mixing weight, E[t − b] under the mixed distribution minus t − b at the target;
        and what the backward needs to find the probabilities again, the largest mixed logit and the logarithm of
        Σ exp(z − largest). Kept apart: their sum would lose digits where logits are large.
    """
    results = tuple(torch.empty(target.shape, dtype=compute_dtype(base.dtype), device=base.device) for _ in range(4))
    nll, slope, largest, log_total = results
    for index in _blocks(base):
        b, t = widen(base[index]), widen(thought[index])
        z, difference = _mixed(b, t, mixing_weight[index]), _difference(b, t)
        at_target = target[index][..., None]
        top = z.amax(dim=-1, keepdim=True)
        target_logit = z.sub_(top).gather(-1, at_target).squeeze(-1)
        total = z.exp_().sum(dim=-1)
        largest[index] = top.squeeze(-1)
        log_total[index] = total.log()
        nll[index] = log_total[index] - target_logit
        slope[index] = torch.linalg.vecdot(z, difference) / total - difference.gather(-1, at_target).squeeze(-1)
    return results


def cross_entropy_backward(
    scale: Tensor,
    base: Tensor,
    thought: Tensor,
    mixing_weight: Tensor,
    target: Tensor,
    largest: Tensor,
    log_total: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of sum(scale · nll) by base and thought.

    ``scale`` [...] is 0 for rows without a gradient, whose logits may be anything.
    """
    d_base, d_thought, _ = _gradients(base, thought, [*needs, False])
    for index in _blocks(base):
        weight, row_scale = mixing_weight[index], scale[index][..., None]
        z = _mixed(widen(base[index]), widen(thought[index]), weight)
        g = z.sub_(largest[index][..., None]).sub_(log_total[index][..., None]).exp_().mul_(row_scale)
        g.masked_fill_(row_scale == 0, 0)
        g.scatter_add_(-1, target[index][..., None], -row_scale)
        _split(g, weight, index, d_base, d_thought)
    return d_base, d_thought


def _mixed(base: Tensor, thought: Tensor, mixing_weight: Tensor) -> Tensor:
    """The mix of a block of the compute dtype, a new tensor: see ``reference.mixed``."""
    weight = mixing_weight[..., None].to(base.dtype)
    mix = torch.lerp(base, thought, weight)
    if _is_finite(mix):
        return mix
    return torch.where(base.isinf() | thought.isinf(), mixed_infinities(base, thought, weight), mix)


def _difference(base: Tensor, thought: Tensor) -> Tensor:
    """The difference thought − base, a new tensor, 0 where either is infinite."""
    difference = thought - base
    return difference if _is_finite(difference) else difference.masked_fill_(base.isinf() | thought.isinf(), 0)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite, if that is known without waiting for a device."""
    return tensor.device.type == "cpu" and bool(tensor.sum().isfinite())


def _blocks(logits: Tensor) -> Iterator[Index]:
    row_bytes = logits.shape[-1] * compute_dtype(logits.dtype).itemsize
    return blocks(logits.shape[:-1], rows_within(BLOCK_BYTES, row_bytes, logits.device))


def _gradients(base: Tensor, thought: Tensor, needs: list[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_base, needs_thought, needs_weight = needs
    return (
        torch.empty_like(base, memory_format=torch.contiguous_format) if needs_base else None,
        torch.empty_like(thought, memory_format=torch.contiguous_format) if needs_thought else None,
        base.new_empty(base.shape[:-1], dtype=compute_dtype(base.dtype)) if needs_weight else None,
    )


def _split(mixed: Tensor, mixing_weight: Tensor, index: Index, d_base: Tensor | None, d_thought: Tensor | None) -> None:
    """Hand the gradient of a block of the mix on to base and thought."""
    weight = mixing_weight[..., None].to(mixed.dtype)
    if d_base is not None:
        d_base[index] = mixed * (1 - weight)
    if d_thought is not None:
        d_thought[index] = mixed * weight
