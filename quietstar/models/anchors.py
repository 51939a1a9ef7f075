"""Anchors, the positions of a text that think: what is predicted from them, and how they are chosen in training."""

from typing import NamedTuple

import torch
from torch import Tensor

from quietstar.models.documents import IGNORE_INDEX, look_ahead, rewarded, sees_ahead


class Ahead(NamedTuple):
    """What the thoughts after A anchors predict: M tokens, starting with the anchor's next token."""

    index: Tensor  # int64 [A, M], or [B, A, M] if each text has its own anchors: base positions to mix with
    target: Tensor  # int64 [B, A, M], labels; −100 where there is none
    rewarded: Tensor | None  # bool [B, R], which of the first R anchors are rewarded; None means all of them
    count: int  # R


def predicted_from(labels: Tensor, lookahead: int, starts: Tensor | None, anchors: Tensor | None) -> Ahead:
    """Return what is predicted from anchors. Anchors that look no further ahead than their text are rewarded.

    (If every position thinks, the last of these is not rewarded, as in the authors' code.)

    Args:
        labels: int [B, L], from ``text_labels``.
        lookahead: M.
        starts: where documents begin, see ``quietstar.models.documents``.
        anchors: int64 [B, A], −1 for none; None means every position except the last.
    """
    last = labels.shape[1] - 2  # the last position that has something to predict
    target = look_ahead(labels, lookahead, starts)
    step = torch.arange(lookahead, device=labels.device)
    if anchors is None:
        index = torch.arange(last + 1, device=labels.device)[:, None] + step
        return Ahead(index.clamp_max(last), target, rewarded(labels, lookahead, starts), last + 1 - lookahead)
    here = anchors.clamp(0, last)
    index = (here[:, :, None] + step).clamp_max(last)
    active = (anchors >= 0) & (anchors <= last)
    target = target.gather(1, here[:, :, None].expand(-1, -1, lookahead)).masked_fill(~active[..., None], IGNORE_INDEX)
    within = sees_ahead(labels, lookahead, starts).gather(1, here)
    return Ahead(index, target, active & within, anchors.shape[1])


def select(states: Tensor, index: Tensor, own: bool) -> Tensor:
    """Select ``states`` [B, L, ...] at positions int64 [...] shared by all texts, or at their ``own``, [B, ...]."""
    if not own:
        return states[:, index]
    offset = torch.arange(len(states), device=index.device) * states.shape[1]
    return states.flatten(0, 1)[index + offset.view(-1, *[1] * (index.dim() - 1))]


def eligible(labels: Tensor, lookahead: int, starts: Tensor | None) -> Tensor:
    """Which positions may be chosen, bool [B, L−1]: rewarded ones with a label for every token they predict."""
    target = look_ahead(labels, lookahead, starts)
    return (target != IGNORE_INDEX).all(dim=-1)


def choose_anchors(allowed: Tensor, count: int, score: Tensor | None = None) -> Tensor:
    """Choose ``count`` positions of every text, in ascending order; −1 where fewer are allowed.

    Args:
        allowed: bool [B, positions].
        score: float [B, positions]; the positions with the highest scores are chosen. Default: random ones, from
            torch's global generator.

    Returns:
        int64 [B, count].
    """
    if score is None:
        score = torch.rand(allowed.shape, device=allowed.device)
    score = score.masked_fill(~allowed, -torch.inf)
    count, missing = min(count, allowed.shape[1]), max(0, count - allowed.shape[1])
    found = score.topk(count, dim=1)
    last = allowed.shape[1]  # sorts after all positions
    anchors = found.indices.masked_fill(found.values == -torch.inf, last).sort(dim=1).values
    return torch.nn.functional.pad(anchors.masked_fill(anchors == last, -1), (0, missing), value=-1)


def check_anchors(anchors: Tensor, shape: tuple[int, int]) -> Tensor:
    """Check given ``anchors`` of texts [B, L] and return them as int64 [B, A].

    Raises:
        TypeError, ValueError: the shape is wrong, the values are not integers, or a position is not in the text.
    """
    if not isinstance(anchors, Tensor) or anchors.is_floating_point() or anchors.dtype == torch.bool:
        raise TypeError(f"anchors must be an integer tensor, got {getattr(anchors, 'dtype', type(anchors).__name__)}")
    if anchors.dim() != 2 or anchors.shape[0] != shape[0] or anchors.shape[1] < 1:
        raise ValueError(f"anchors must have shape [{shape[0]}, A] with A >= 1, got {list(anchors.shape)}")
    if bool(((anchors < -1) | (anchors >= shape[1])).any()):
        raise ValueError(
            f"anchors must be positions in [0, {shape[1]}) or -1, got {int(anchors.min())} to {int(anchors.max())}"
        )
    return anchors.to(torch.int64)
