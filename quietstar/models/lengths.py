"""Thoughts of different lengths. A thought of n tokens, 1 ≤ n ≤ k, is stored as int64 [k] with −1 from n on."""

import torch
from torch import Tensor

from quietstar.models.configuration import QuietStarConfig
from quietstar.ops._checks import check_integer, check_range, check_tensor


def lengths_of(tokens: Tensor) -> Tensor:
    """Count the tokens of each thought [..., k] before its end, int64 [...]."""
    return (tokens >= 0).sum(dim=-1)


def cut_thoughts(tokens: Tensor | None, lengths: Tensor, config: QuietStarConfig) -> Tensor:
    """Set ``thought_tokens`` [..., k] to −1 after given ``thought_lengths`` [...].

    Raises:
        TypeError, ValueError: there are no thoughts, or none of learned length; or lengths have the wrong shape or are
            out of range.
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
    """Whether thoughts [..., k] are −1 only after their end, or, if some ``may_lack``, also throughout."""
    there = tokens >= 0
    in_front = there[..., 1:] & ~there[..., :-1]
    return not bool(in_front.any() if may_lack else in_front.any() | ~there[..., :1].all())


def drawn_tokens(tokens: Tensor, end: int, nothing: int) -> Tensor:
    """Return the draws that led to thoughts [..., k]: their tokens, then the ``end`` token, then ``nothing``."""
    length, place = lengths_of(tokens)[..., None], torch.arange(tokens.shape[-1], device=tokens.device)
    return tokens.masked_fill(place >= length, nothing).masked_fill((place == length) & (place > 0), end)


def behind_ends(hidden: Tensor, lengths: Tensor, count: int = 1) -> Tensor:
    """Select hidden states [..., S, H] of thoughts' slots from the end token on: [..., count, H].

    Args:
        hidden: hidden states of the slots.
        lengths: int64 [...], number of tokens before the end.
        count: number of states to select.
    """
    slots = lengths[..., None] + 1 + torch.arange(count, device=lengths.device)
    return hidden.gather(-2, slots[..., None].expand(*slots.shape, hidden.shape[-1]))


def slots_of(tokens: Tensor, start: Tensor, inside: Tensor, end: Tensor, *following: Tensor) -> Tensor:
    """Arrange the embeddings of thoughts [B, P, S, H]: start, tokens, end, following text, then unused slots.

    Args:
        tokens: int64 [B, P, k].
        start, end: [B, P, 1, H].
        inside: [B, P, k, H], embeddings of the tokens.
        following: [B, P, M−1, H], embeddings of the text after the anchors, or nothing; S = k + 2 + M − 1 or k + 2.
    """
    parts = torch.cat([start, inside, end, *following], dim=2)
    k, slot = tokens.shape[-1], torch.arange(parts.shape[2], device=tokens.device)
    missing = k - lengths_of(tokens)[..., None]  # the end and the following text come this many slots earlier
    source = torch.where(slot <= k - missing, slot, (slot + missing).clamp_max(parts.shape[2] - 1))
    return parts.gather(2, source[..., None].expand(*source.shape, parts.shape[-1]))
