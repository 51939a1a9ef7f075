"""Shared arguments of the vocabulary ops: targets, suppressed tokens, and the reduction of a loss over rows."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from quietstar.ops._checks import can_read_values, check_choice, check_integer, check_same_device, check_tensor
from quietstar.ops._precision import compute_dtype
from quietstar.ops._rows import BLOCK_BYTES, rows_within, slices

# Marks in int64 targets, besides token ids: a row without a target (nll 0), and a row with an invalid target where
# raising an error would wait for the device (nll NaN). Neither row has a gradient.
IGNORED, INVALID = -1, -2

REDUCTIONS = ("mean", "sum", "none")

# Logits are divided in float32. Outside these limits, ordinary logits / temperature, or 1 / temperature, are infinite
# or 0.
_DIVISORS = 1e-30, 1e30


class Softmax(NamedTuple):
    """How logits become probabilities: cap, division by the temperature, and suppressed tokens."""

    temperature: float
    softcap: float | None
    suppress: Tensor | None  # int64 token ids


def check_head(vocabulary: int, hidden_size: int, hidden: str) -> None:
    """Require a head to have at least one token and one column; ``hidden`` is the name of the input argument."""
    if vocabulary == 0:
        raise ValueError("weight must have at least one row, got none")
    if hidden_size == 0:
        raise ValueError(f"{hidden} must have at least one column, got none")


def checked_number(name: str, value: float, kind: str = "a number") -> float:
    """Return ``value`` as a float; TypeError if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
    return float(value)


def checked_temperature(temperature: float, *, zero: bool) -> float:
    """Return ``temperature`` as a float; require it to be in the valid range, or 0 if ``zero`` is True."""
    temperature = checked_number("temperature", temperature)
    if temperature == 0 and zero:
        return temperature
    if not 0 < temperature < math.inf:
        kind = "0 or positive, and finite" if zero else "positive and finite"
        raise ValueError(f"temperature must be {kind}, got {temperature}")
    return _checked_divisor("temperature", temperature)


def checked_softcap(softcap: float | None) -> float | None:
    """Return ``softcap`` as None or a float; require it to be in the valid range."""
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
    """Compute cap · tanh(logit / cap), but keep infinities, so that a token of probability 0 stays impossible."""
    if softcap is None:
        return logits
    return torch.where(logits.isinf(), logits, softcap * torch.tanh(logits / softcap))


def cap_logits_(logits: Tensor, softcap: float | None) -> None:
    """Like ``cap_logits``, in place and in blocks of rows, for [rows, V]."""
    if softcap is not None:
        for part in slices(len(logits), rows_within(BLOCK_BYTES, logits[:1].nbytes, logits.device)):
            torch.where(
                logits[part].isinf(), logits[part], (logits[part] / softcap).tanh_().mul_(softcap), out=logits[part]
            )


def suppressed_ids(suppress: Iterable[int] | Tensor | None, vocabulary: int, device: torch.device) -> Tensor | None:
    """Return ``suppress`` as an int64 tensor, or None if it names no token.

    Raises:
        TypeError: the ids are not integers.
        ValueError: ``suppress`` is not one-dimensional or on another device, an id is outside the vocabulary, or no
            token is left.
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
        # Filled on the device: a copy would read host memory again whenever a CUDA graph is replayed.
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
    """Convert ``target`` to the form that kernels take: int64, with ``ignore_index`` replaced by ``IGNORED``.

    Raises:
        ValueError: a target is outside the vocabulary or suppressed. Where values cannot be read
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
    """Set per-row nll or entropy to 0 where the target is ``IGNORED`` and NaN where ``INVALID``, without gradient."""
    return values.masked_fill(target == IGNORED, 0).masked_fill(target == INVALID, float("nan"))


def check_reduction(reduction: str, ignore_index: int, row_weight: Tensor | None, target: Tensor) -> None:
    """Check the arguments that say how a loss is reduced over the rows of ``target``."""
    check_choice("reduction", reduction, REDUCTIONS)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer, got {type(ignore_index).__name__}")
    if row_weight is not None:
        check_tensor("row_weight", row_weight)
        _check_of_rows("row_weight", row_weight, reduction, target)


def checked_entropy_weight(
    entropy_weight: float | Tensor | None, reduction: str, target: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Return the weight of every row's entropy in the loss as a tensor; None if the loss has no entropy term."""
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
    """Check a per-row weight, which is allowed only with the reduction "sum"."""
    if reduction != "sum":
        raise ValueError(f"{name} must come with reduction='sum', got reduction={reduction!r}")
    if not weight.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {weight.dtype}")
    if weight.shape != target.shape:
        raise ValueError(f"{name} must have the shape of target, {list(target.shape)}, got {list(weight.shape)}")
    check_same_device(target=target, **{name: weight})


def row_scales(target: Tensor, reduction: str, row_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return d loss / d nll for every row, for "mean" and "sum", in the compute dtype of ``dtype``."""
    dtype = compute_dtype(dtype)
    counts = target != IGNORED
    if row_weight is not None:
        return row_weight.to(dtype).masked_fill(~counts, 0)
    if reduction == "mean":  # 0 if there are no rows
        return counts.to(dtype) / counts.sum().clamp_min(1)
    return counts.to(dtype)


def counted(row_scale: Tensor, values: Tensor) -> Tensor:
    """Replace values that are not finite by 0 in rows of scale 0, so that these rows add nothing to a sum."""
    return values.masked_fill((row_scale == 0) & ~values.isfinite(), 0)


def weighted_sum(row_scale: Tensor, values: Tensor) -> Tensor:
    """Compute Σ row_scale · values, where a row of scale 0 adds 0 even if its value is not finite."""
    return (row_scale * counted(row_scale, values)).sum()


def check_mixing_weight(mixing_weight: Tensor, model: str, dtype: torch.dtype) -> None:
    """Require the mixing weight, which a separate head computes, to have the dtype of argument ``model`` or float32."""
    if mixing_weight.dtype not in (dtype, torch.float32):
        raise TypeError(
            f"mixing_weight must be float32 or have the dtype of {model}, {dtype}, got {mixing_weight.dtype}"
        )
