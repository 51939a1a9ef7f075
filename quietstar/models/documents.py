"""Where documents begin, derived from the attention mask (padding) and the position ids (packed documents).

Everywhere, ``starts`` is int64 [B] (the first column of each row that is not left padding), int64 [B, L] (packed rows:
the first column of each token's document), or None (every row is one document that begins at column 0).
"""

import torch
from torch import Tensor

IGNORE_INDEX = -100


def first_key(attention_mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Find the first position of each sequence that is not left padding; None if there is no left padding.

    Right padding needs no mask, since causal attention never looks at it.

    Args:
        attention_mask: [B, L], 1 for tokens and 0 for padding; or the resulting positions themselves, [B], into which
            ``generate`` converts a mask for compileable caches; or None.
        shape: the expected (B, L).

    Returns:
        int64 [B], or None.

    Raises:
        ValueError: the shape is wrong, or there is padding between tokens.
    """
    if attention_mask is None or attention_mask.dim() == 1:
        return attention_mask
    if tuple(attention_mask.shape) != tuple(shape):
        raise ValueError(f"attention_mask must have shape {list(shape)}, got {list(attention_mask.shape)}")
    mask = attention_mask.bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).sum(dim=1).gt(~mask[:, 0]).any()):
        raise ValueError("attention_mask must be one run of ones per sequence, got padding between tokens")
    if bool(mask[:, 0].all()):
        return None
    return mask.to(torch.int64).argmax(dim=1)


def document_starts(
    attention_mask: Tensor | None, position_ids: Tensor | None, shape: tuple[int, int]
) -> Tensor | None:
    """Compute ``starts`` of whole rows. Given a mask or positions, this reads their values, which waits for a GPU.

    A document begins wherever a position is not one more than the previous one, as for Mistral in transformers.

    Args:
        attention_mask: [B, L] or None.
        position_ids: int [B, L] or [1, L] as given by the caller, or None for one document.
        shape: the expected (B, L).

    Raises:
        ValueError: the mask has the wrong shape or padding between tokens.
    """
    padding = first_key(attention_mask, shape)
    if position_ids is None or not bool(_begins(attention_mask, position_ids).any()):
        return padding
    return token_starts(attention_mask, position_ids, shape)


def token_starts(attention_mask: Tensor | None, position_ids: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Like ``document_starts``, but without reading values: always [B, L] if a mask or positions are given."""
    starts = None
    if position_ids is not None:
        column = torch.arange(1, shape[1], device=position_ids.device)
        begins = torch.nn.functional.pad(_begins(attention_mask, position_ids) * column, (1, 0))
        starts = begins.cummax(dim=1).values.expand(shape)
    if attention_mask is None:
        return starts
    padding = attention_mask.bool().to(torch.int64).argmax(dim=1)[:, None].expand(shape)
    return padding if starts is None else torch.maximum(starts, padding)


def _begins(attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
    """Which tokens after the first of each row begin a document, bool [B, L−1]; positions of padding are ignored."""
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if attention_mask is not None:
        begins = begins & attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
    return begins


def at_anchors(starts: Tensor | None, anchors: Tensor) -> Tensor | None:
    """Return ``starts`` as the ``key_start`` of thoughts after ``anchors`` [P] or [B, P]: int64 [B] or [B, P]."""
    if starts is None or starts.dim() == 1:
        return starts
    return starts.gather(1, anchors.clamp_min(0).expand(len(starts), -1))


def text_labels(labels: Tensor, attention_mask: Tensor | None, starts: Tensor | None) -> Tensor:
    """Return labels int [B, L], −100 in padding and for the first token of each document, which is not predicted."""
    if attention_mask is not None:
        labels = labels.masked_fill(attention_mask == 0, IGNORE_INDEX)
    if starts is None:
        return labels
    column = torch.arange(labels.shape[1], device=labels.device)
    return labels.masked_fill(column <= _of_tokens(starts, labels), IGNORE_INDEX)


def look_ahead(labels: Tensor, lookahead: int, starts: Tensor | None) -> Tensor:
    """Return labels of the predictions after thoughts, int [B, L−1, M]: token i+1+m for look-ahead m at position i.

    They are −100 beyond the end of the row or of the thought's document, and for thoughts after padding.

    Args:
        labels: int [B, L], from ``text_labels``.
        lookahead: M.
        starts: as in this module's docstring.
    """
    positions = labels.shape[1] - 1
    anchor = torch.arange(positions, device=labels.device)[:, None]
    column = anchor + torch.arange(1, lookahead + 1, device=labels.device)
    inside = column <= positions
    column = column.clamp_max(positions)
    if starts is not None:
        starts = _of_tokens(starts, labels)
        own = starts[:, :-1, None]
        inside = inside & (starts[:, column] == own) & (own <= anchor)
    return labels[:, column].masked_fill(~inside, IGNORE_INDEX)


def rewarded(labels: Tensor, lookahead: int, starts: Tensor | None) -> Tensor | None:
    """Which of the first L−1−M thoughts are rewarded, bool [B, L−1−M]: those that look no further than their document.

    None means all of them. The arguments are those of ``look_ahead``.
    """
    if starts is None or starts.dim() == 1:
        return None
    return starts[:, lookahead + 1 :] == starts[:, : labels.shape[1] - 1 - lookahead]


def sees_ahead(labels: Tensor, lookahead: int, starts: Tensor | None) -> Tensor:
    """Which positions except the last have all M tokens ahead in their document, bool [1 or B, L−1].

    The arguments are those of ``look_ahead``.
    """
    last = labels.shape[1] - 1
    position = torch.arange(last, device=labels.device)[None]
    inside = position + lookahead <= last
    if starts is None:
        return inside.expand(len(labels), -1)
    starts = _of_tokens(starts, labels)
    return (
        inside & (starts[:, :-1] <= position) & (starts[:, (position[0] + lookahead).clamp_max(last)] == starts[:, :-1])
    )


def _of_tokens(starts: Tensor, labels: Tensor) -> Tensor:
    """Expand ``starts`` to [B, L]."""
    return starts if starts.dim() == 2 else starts[:, None].expand(labels.shape)
