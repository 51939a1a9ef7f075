"""Arguments that name tokens: which targets count, which tokens are suppressed, how a loss is reduced over rows."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from quietstar.ops._checks import can_read_values, check_choice, check_integer, check_same_device, check_tensor
from quietstar.ops._precision import compute_dtype
from quietstar.ops._rows import BLOCK_BYTES, rows_within, slices

# Kernels know targets as int64 tokens, and two marks: a row without a target (nll 0), and a row whose target is wrong
# where raising would mean waiting for the device (nll NaN). Neither row has a gradient.
IGNORED, INVALID = -1, -2

REDUCTIONS = ("mean", "sum", "none")

# Logits are divided in float32. Beyond these, quotients of ordinary logits, or 1 / temperature, are infinite or 0.
_DIVISORS = 1e-30, 1e30


class Softmax(NamedTuple):
    """How logits become probabilities: they are capped, divided by the temperature, and some left out."""

    temperature: float
    softcap: float | None
    suppress: Tensor | None  # int64 token ids


def check_head(vocabulary: int, hidden_size: int, hidden: str) -> None:
    """A head has at least one token, and at least one column for the argument ``hidden`` to be multiplied with."""
    if vocabulary == 0:
        raise ValueError("weight must have at least one row, got none")
    if hidden_size == 0:
        raise ValueError(f"{hidden} must have at least one column, got none")


def checked_number(name: str, value: float, kind: str = "a number") -> float:
    """``value`` as a float; TypeError if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
    return float(value)


def checked_temperature(temperature: float, *, zero: bool) -> float:
    """``temperature`` as a float, positive and of a size to divide by, or 0 where that has a meaning."""
    temperature = checked_number("temperature", temperature)
    if temperature == 0 and zero:
        return temperature
    if not 0 < temperature < math.inf:
        kind = "0 or positive, and finite" if zero else "positive and finite"
        raise ValueError(f"temperature must be {kind}, got {temperature}")
    return _checked_divisor("temperature", temperature)


def checked_softcap(softcap: float | None) -> float | None:
    """``softcap`` as None or a float, positive and of a size to divide by."""
    if softcap is None:
        return None
    softcap = checked_number("softcap", softcap, "None or a number")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None, or positive and finite, got {softcap}")
    return _checked_divisor("softcap", softcap)


def _checked_divisor(name: str, value: float) -> float:
    low, high = _DIVISORS
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
    return value


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits through cap · tanh(logit / cap), but infinities as they are: a token of probability 0 stays one."""
    if softcap is None:
        return logits
    return torch.where(logits.isinf(), logits, softcap * torch.tanh(logits / softcap))


def cap_logits_(logits: Tensor, softcap: float | None) -> None:
    """As ``cap_logits``, in place, for [rows, V]: by blocks of rows."""
    if softcap is not None:
        for part in slices(len(logits), rows_within(BLOCK_BYTES, logits[:1].nbytes, logits.device)):
            torch.where(
                logits[part].isinf(), logits[part], (logits[part] / softcap).tanh_().mul_(softcap), out=logits[part]
            )


def suppressed_ids(suppress: Iterable[int] | Tensor | None, vocabulary: int, device: torch.device) -> Tensor | None:
    """``suppress`` as an int64 tensor, or None if it names no token.

    Raises:
        TypeError: not integers.
        ValueError: not one-dimensional, on another device, an id outside the vocabulary, or no token left.
    """
    if suppress is None:
        return None
    if isinstance(suppress, Tensor):
        check_integer("suppress", suppress)
        if suppress.dim() != 1:
            raise ValueError(f"suppress must be one-dimensional, got shape {list(suppress.shape)}")
        if suppress.device != device:
            raise ValueError(f"suppress must be on the device of weight, {device}, got {suppress.device}")
        ids = suppress.to(torch.int64)
        known = suppress.tolist() if can_read_values(suppress) else None
    else:
        known = list(suppress) if isinstance(suppress, Iterable) else [None]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in known):
            raise TypeError(f"suppress must be token ids (integers), got {suppress!r}")
        # Filled in on the device: a copy would read the host's memory again whenever a CUDA graph is replayed.
        ids = torch.empty(len(known), dtype=torch.int64, device=device)
        for place, token in enumerate(known):
            ids[place].fill_(token)
    if known is not None:
        outside = [i for i in known if not 0 <= i < vocabulary]
        if outside:
            raise ValueError(f"suppress must be token ids in [0, {vocabulary}), got {outside[0]}")
        if len(set(known)) == vocabulary:
            raise ValueError(f"suppress must leave at least one token, got all {vocabulary}")
    return ids if ids.shape[0] else None


def marked_target(target: Tensor, vocabulary: int, ignore_index: int, suppress: Tensor | None = None) -> Tensor:
    """``target`` as kernels know it: int64, ``ignore_index`` replaced by ``IGNORED``.

    Raises:
        ValueError: a target outside the vocabulary or suppressed. Where values cannot be read
            (``quietstar.ops._checks.can_read_values``) such rows are marked ``INVALID`` instead.
    """
    target = target.to(torch.int64)
    ignored = target == ignore_index
    outside = ((target < 0) | (target >= vocabulary)) & ~ignored
    suppressed = torch.zeros_like(ignored)
    if suppress is not None:
        suppressed = (target[..., None] == suppress).any(dim=-1) & ~ignored
    if can_read_values(target):
        if outside.any():
            raise ValueError(
                f"target must be in [0, {vocabulary}) or ignore_index = {ignore_index}, "
                f"got {target[outside].flatten()[0].item()}"
            )
        if suppressed.any():
            raise ValueError(f"target must not be suppressed, got {target[suppressed].flatten()[0].item()}")
    return target.masked_fill(outside | suppressed, INVALID).masked_fill(ignored, IGNORED)


def mark_rows(values: Tensor, target: Tensor) -> Tensor:
    """Per-row nll or entropy, 0 where the target is ``IGNORED`` and NaN where ``INVALID``; no gradient to either."""
    return values.masked_fill(target == IGNORED, 0).masked_fill(target == INVALID, float("nan"))


def check_reduction(reduction: str, ignore_index: int, row_weight: Tensor | None, target: Tensor) -> None:
    """Check how a loss is reduced over the rows of ``target``: which are ignored, and what the others weigh."""
    check_choice("reduction", reduction, REDUCTIONS)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer, got {type(ignore_index).__name__}")
    if row_weight is not None:
        check_tensor("row_weight", row_weight)
        _check_of_rows("row_weight", row_weight, reduction, target)


def checked_entropy_weight(
    entropy_weight: float | Tensor | None, reduction: str, target: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """What the entropy of every row of ``target`` weighs in a loss, as a tensor; None if it has no part in it."""
    if entropy_weight is None:
        return None
    if not isinstance(entropy_weight, Tensor):
        number = checked_number("entropy_weight", entropy_weight, "None, a number or a torch.Tensor")
        if not math.isfinite(number):
            raise ValueError(f"entropy_weight must be finite, got {number}")
        entropy_weight = torch.full(target.shape, number, dtype=compute_dtype(dtype), device=target.device)
    _check_of_rows("entropy_weight", entropy_weight, reduction, target)
    return entropy_weight


def _check_of_rows(name: str, weight: Tensor, reduction: str, target: Tensor) -> None:
    """A weight of every row, which only a sum has."""
    if reduction != "sum":
        raise ValueError(f"{name} must come with reduction='sum', got reduction={reduction!r}")
    if not weight.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {weight.dtype}")
    if weight.shape != target.shape:
        raise ValueError(f"{name} must have the shape of target, {list(target.shape)}, got {list(weight.shape)}")
    check_same_device(target=target, **{name: weight})


def row_scales(target: Tensor, reduction: str, row_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Derivative of the loss by the nll of every row, for "mean" and "sum", in the compute dtype of ``dtype``."""
    dtype = compute_dtype(dtype)
    counts = target != IGNORED
    if row_weight is not None:
        return row_weight.to(dtype).masked_fill(~counts, 0)
    if reduction == "mean":  # over no rows at all it is 0
        return counts.to(dtype) / counts.sum().clamp_min(1)
    return counts.to(dtype)


def counted(row_scale: Tensor, values: Tensor) -> Tensor:
    """The values, 0 where one is not finite and the row's scale is 0: such a row adds nothing to a sum."""
    return values.masked_fill((row_scale == 0) & ~values.isfinite(), 0)


def weighted_sum(row_scale: Tensor, values: Tensor) -> Tensor:
    """Sum of row_scale · values, to which a row of scale 0 adds 0 even if its value is not finite."""
    return (row_scale * counted(row_scale, values)).sum()


def check_mixing_weight(mixing_weight: Tensor, model: str, dtype: torch.dtype) -> None:
    """The mixing weight, made by a small network of its own, has the dtype of argument ``model`` or float32."""
    if mixing_weight.dtype not in (dtype, torch.float32):
        raise TypeError(
            f"mixing_weight must be float32 or have the dtype of {model}, {dtype}, got {mixing_weight.dtype}"
        )
