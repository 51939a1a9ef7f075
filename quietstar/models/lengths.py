"""Thoughts of different lengths: of n tokens, 1 ≤ n ≤ k, is int64 [k], −1 from n on."""

import torch
from torch import Tensor

from quietstar.models.configuration import QuietStarConfig
from quietstar.ops._checks import check_integer, check_range, check_tensor


def lengths_of(tokens: Tensor) -> Tensor:
    """Tokens of each thought [..., k] in front of its end, int64 [...]."""
    return (tokens >= 0).sum(dim=-1)


def cut_thoughts(tokens: Tensor | None, lengths: Tensor, config: QuietStarConfig) -> Tensor:
    """``thought_tokens`` [..., k] of given ``thought_lengths`` [...], −1 behind their ends.

    Raises:
        TypeError, ValueError: lengths without thoughts, of another shape, out of range, or where none end themselves.
    """
    if not config.learned_thought_end:
        raise ValueError("thought_lengths must be left out with learned_thought_end False")
    if tokens is None:
        raise ValueError("thought_tokens must be given with thought_lengths, got None")
    check_tensor("thought_tokens", tokens)
    check_tensor("thought_lengths", lengths)
    check_integer("thought_lengths", lengths)
    if lengths.shape != tokens.shape[:-1]:
        raise ValueError(
            f"thought_lengths must have the shape of thought_tokens without its last dimension, "
            f"{list(tokens.shape[:-1])}, got {list(lengths.shape)}"
        )
    check_range("thought_lengths", lengths, 0, tokens.shape[-1])
    return tokens.masked_fill(torch.arange(tokens.shape[-1], device=tokens.device) >= lengths[..., None], -1)


def ends_are_behind(tokens: Tensor, may_lack: bool) -> bool:
    """Whether thoughts [..., k] are −1 behind their ends only, or all through if some ``may_lack``."""
    there = tokens >= 0
    in_front = there[..., 1:] & ~there[..., :-1]
    return not bool(in_front.any() if may_lack else in_front.any() | ~there[..., :1].all())


def drawn_tokens(tokens: Tensor, end: int, nothing: int) -> Tensor:
    """What was drawn to make thoughts [..., k]: their tokens, then the ``end`` token, ``nothing`` behind it."""
    length, place = lengths_of(tokens)[..., None], torch.arange(tokens.shape[-1], device=tokens.device)
    return tokens.masked_fill(place >= length, nothing).masked_fill((place == length) & (place > 0), end)


def behind_ends(hidden: Tensor, lengths: Tensor, count: int = 1) -> Tensor:
    """Hidden states [..., S, H] of thoughts' slots at the end token and behind it, [..., count, H].

    Args:
        lengths: int64 [...], tokens in front of the end.
    """
    slots = lengths[..., None] + 1 + torch.arange(count, device=lengths.device)
    return hidden.gather(-2, slots[..., None].expand(*slots.shape, hidden.shape[-1]))


def slots_of(tokens: Tensor, start: Tensor, inside: Tensor, end: Tensor, *following: Tensor) -> Tensor:
    """Embeddings [B, P, S, H] of thoughts: start, their tokens, end, what follows, and unused ones behind these.

    Args:
        tokens: int64 [B, P, k].
        start, end: [B, P, 1, H].
        inside: [B, P, k, H], of the tokens.
        following: of the text behind the anchors, [B, P, M−1, H] or nothing; S = k + 2 + M − 1 or k + 2.
    """
    parts = torch.cat([start, inside, end, *following], dim=2)
    k, slot = tokens.shape[-1], torch.arange(parts.shape[2], device=tokens.device)
    missing = k - lengths_of(tokens)[..., None]  # the end and what follows come so many slots earlier
    source = torch.where(slot <= k - missing, slot, (slot + missing).clamp_max(parts.shape[2] - 1))
    return parts.gather(2, source[..., None].expand(*source.shape, parts.shape[-1]))
