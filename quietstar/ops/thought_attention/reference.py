"""The specification of thought attention: one dense mask over base and thought keys, autograd does the rest."""

import torch
from torch import Tensor

from quietstar.ops._precision import widen


def per_anchor(key_start: Tensor) -> Tensor:
    """``key_start`` of [B] or [B, P] as [B, 1] or [B, P]."""
    return key_start[:, None] if key_start.dim() == 1 else key_start


def visibility(
    base_length: int, steps: int, thought_steps: int, anchors: Tensor, key_start: Tensor, window: int | None
) -> Tensor:
    """The thought mask: which keys each query sees.

    Args:
        base_length: L.
        steps, thought_steps: S and T; the queries are the last S of the T steps.
        anchors: [B, P], −1 inactive.
        key_start: [B] or [B, P], first visible base key.
        window: base key j is visible iff a − j < window; None is no limit.

    Returns:
        bool [B, P, S, L + P·T], the thought keys anchor-major behind the base keys.
    """
    batch, num_anchors = anchors.shape
    device = anchors.device
    anchor = anchors[:, :, None]
    position = torch.arange(base_length, device=device)
    base = (position <= anchor) & (position >= per_anchor(key_start)[..., None])  # [B, P, L]
    if window is not None:
        base &= anchor - position < window
    base = base[:, :, None, :].expand(-1, -1, steps, -1)

    own = torch.eye(num_anchors, dtype=torch.bool, device=device)[:, None, :, None]  # [P, 1, P, 1]
    step = torch.arange(thought_steps, device=device)
    earlier = step <= step[thought_steps - steps :, None]  # [S, T]
    thought = (own & earlier[:, None, :]).flatten(2).expand(batch, -1, -1, -1)  # [B, P, S, P·T]
    return torch.cat([base, thought & (anchor >= 0)[..., None]], dim=-1)


def thought_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thought_key: Tensor,
    thought_value: Tensor,
    anchors: Tensor,
    key_start: Tensor,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, P, S, D] and natural-log lse [B, Hq, P, S]; shapes as in the public function, anchors [B, P].

    Scores and sums are in float32 or wider. What no row sees is zero before it is multiplied: 0 · NaN would be NaN.
    """
    num_anchors, steps = query.shape[2:4]
    visible = visibility(key.shape[2], steps, thought_key.shape[3], anchors, key_start, window)
    visible = visible.flatten(1, 2)[:, None]  # [B, 1, P·S, L + P·T]
    active = visible.any(dim=-1, keepdim=True)
    unseen = ~visible.any(dim=-2)[..., None]  # [B, 1, L + P·T, 1]

    group = query.shape[1] // max(1, key.shape[1])
    keys, values = (
        torch.cat([base, thought.flatten(2, 3)], dim=2).masked_fill(unseen, 0).repeat_interleave(group, dim=1)
        for base, thought in ((widen(key), widen(thought_key)), (widen(value), widen(thought_value)))
    )
    rows = widen(query).flatten(2, 3).masked_fill(~active, 0)
    scores = (rows @ keys.mT) * scale
    scores = scores.masked_fill(~visible & active, -torch.inf)  # rows that see nothing stay finite: no NaN gradients
    lse = scores.logsumexp(dim=-1, keepdim=True)
    output = (scores - lse).exp() @ values
    output = output.where(active, 0).unflatten(2, (num_anchors, steps))
    lse = lse.where(active, -torch.inf)[..., 0].unflatten(2, (num_anchors, steps))
    return output.to(query.dtype), lse
