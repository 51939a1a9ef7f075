"""Means over held-out tokens, with standard errors over texts: over all tokens, some of them, or groups of them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from quietstar._numbers import Interval
from quietstar.evaluation.held_out import HeldOutNll


class Mean(NamedTuple):
    """A mean over tokens and its standard error, which treats windows as independent draws.

    The error is NaN if fewer than two windows contain such tokens, and the mean is NaN if none does.
    """

    value: float
    error: float


class Gain(NamedTuple):
    """The effect of thoughts on some tokens: means over these tokens, in nats."""

    tokens: int
    base: Mean  # nll without a thought
    mixed: Mean  # nll after a thought
    thought: Mean  # nll of the thought's prediction alone
    gain: Mean  # base − mixed
    mixing_weight: Mean


def gain(nll: HeldOutNll, chosen: Tensor | None = None) -> Gain:
    """Compute the gain on the tokens ``chosen``, bool [windows, L−1]; default all."""
    return _gains(nll, _group_of("nll", nll.base, chosen), 1)[0]


def gain_by_difficulty(
    nll: HeldOutNll, before: Tensor, parts: int = 10, chosen: Tensor | None = None
) -> list[Gain]:  # fmt: skip
    """Compute the gain on each tenth of the tokens, easiest first.

    Args:
        nll: from ``held_out_nll``.
        before: [windows, L−1], the tokens' difficulty: their nll under a model whose nll is not compared here, best the
            model before Quiet-STaR. (A model rated on the tokens on which it did worst would look worse than it is.)
        parts: number of parts, equal in size to within a token. Ties in ``before`` are broken by position.
        chosen: bool [windows, L−1], the tokens to divide. Default: all.

    Raises:
        TypeError, ValueError: ``before`` or ``chosen`` has the wrong shape, or there are more parts than tokens.
    """
    _check_shape("before", before, "nll", nll.base)
    groups = _group_of("nll", nll.base, chosen)
    difficulty = before[groups == 0]
    count = len(difficulty)
    Interval(int, f"[1, {count}]").check("parts", parts)
    part = torch.empty(count, dtype=torch.int64, device=before.device)
    part[difficulty.argsort(stable=True)] = torch.arange(count, device=before.device) * parts // count
    groups[groups == 0] = part
    return _gains(nll, groups, parts)


def gain_by_position(nll: HeldOutNll, width: int = 1) -> list[Gain]:
    """Compute the gain on stretches of ``width`` tokens, from the beginning of windows to their end; token i+1 is at i.

    Raises:
        TypeError, ValueError: the width is below 1.
    """
    Interval(int, "[1, inf)").check("width", width)
    positions = torch.arange(nll.base.shape[1], device=nll.base.device) // width
    return _gains(nll, positions.expand_as(nll.base), int(positions[-1]) + 1)


def gain_by_token(nll: HeldOutNll, windows: Tensor) -> dict[int, Gain]:
    """Compute the gain, by token id, on every token of the vocabulary that occurs in ``windows``, int64 [windows, L].

    Raises:
        ValueError: the windows have the wrong shape.
    """
    following = windows[:, 1:]
    _check_shape("windows[:, 1:]", following, "nll", nll.base)
    tokens, groups = following.unique(return_inverse=True)
    return dict(zip(tokens.tolist(), _gains(nll, groups, len(tokens)), strict=True))


def hardest(nll: Tensor, share: float = 0.1) -> Tensor:
    """Mark the tokens with the highest ``nll``, bool like it: a ``share`` of all, rounded, more in case of ties.

    As for ``gain_by_difficulty``, the nll should be that of a model that is not compared on these tokens.

    Raises:
        TypeError, ValueError: the share is outside (0, 1], or there are no tokens.
    """
    Interval(float, "(0, 1]").check("share", share)
    if nll.numel() == 0:
        raise ValueError(f"nll must hold at least one token, got shape {list(nll.shape)}")
    count = max(1, round(nll.numel() * share))
    return nll >= nll.flatten().topk(count).values[-1]


def token_mean(values: Tensor, chosen: Tensor | None = None) -> Mean:
    """Compute the mean of ``values`` [windows, L−1] over the tokens ``chosen`` (default all).

    The standard error is that of a ratio of sums over windows, since tokens of one text are not independent.

    Raises:
        ValueError: ``chosen`` has the wrong shape.
    """
    return _means(values, _group_of("values", values, chosen), 1)[0]


def _group_of(name: str, values: Tensor, chosen: Tensor | None) -> Tensor:
    """Assign group 0 to chosen tokens and −1, no group, to the others."""
    if chosen is None:
        return torch.zeros_like(values, dtype=torch.int64)
    _check_shape("chosen", chosen, name, values)
    return chosen.long() - 1


def _gains(nll: HeldOutNll, groups: Tensor, count: int) -> list[Gain]:
    columns = nll.base, nll.mixed, nll.thought, nll.base - nll.mixed, nll.mixing_weight
    tokens = groups[groups >= 0].bincount(minlength=count).tolist()
    return [Gain(*row) for row in zip(tokens, *(_means(column, groups, count) for column in columns), strict=True)]


def _means(values: Tensor, groups: Tensor, count: int) -> list[Mean]:
    """Compute the means of ``values`` [windows, T] in groups 0 … count − 1, int64 [windows, T]; −1 is no group."""
    windows, grouped = len(values), groups >= 0
    cells = (groups + count * torch.arange(windows, device=groups.device)[:, None])[grouped]
    sums, counts = values.new_zeros(2, windows * count, dtype=torch.float64)
    sums.index_add_(0, cells, values[grouped].double())
    counts.index_add_(0, cells, torch.ones_like(cells, dtype=torch.float64))
    sums, counts = sums.view(windows, count), counts.view(windows, count)
    totals = counts.sum(dim=0)
    means = sums.sum(dim=0) / totals
    spread = (sums - means * counts).square().sum(dim=0).sqrt() / totals
    known = (counts > 0).sum(dim=0) > 1
    errors = torch.where(known, spread * math.sqrt(windows / max(1, windows - 1)), torch.nan)
    return [Mean(*pair) for pair in zip(means.tolist(), errors.tolist(), strict=True)]


def _check_shape(name: str, given: Tensor, like: str, values: Tensor) -> None:
    if given.shape != values.shape:
        raise ValueError(f"{name} must have the shape of {like}, {list(values.shape)}, got {list(given.shape)}")
