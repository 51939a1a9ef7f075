"""The specification of thought attention: one dense mask over base and thought keys, autograd does the rest."""

import torch
from torch import Tensor


def visibility(
    base_length: int, steps: int, thought_steps: int, anchors: Tensor, key_start: Tensor, window: int | None
) -> Tensor:
    """The thought mask: which keys each query sees.

    Args:
        base_length: L.
        steps, thought_steps: S and T; the queries are the last S of the T steps.
        anchors: [B, P], −1 inactive.
        key_start: [B], first visible base key.
        window: base key j is visible iff a − j < window; None is no limit.

    Returns:
        bool [B, P, S, L + P·T], the thought keys anchor-major behind the base keys.
    """
    batch, num_anchors = anchors.shape
    device = anchors.device
    anchor = anchors[:, :, None]
    position = torch.arange(base_length, device=device)
    base = (position <= anchor) & (position >= key_start[:, None, None])  # [B, P, L]
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
    """Output [B, Hq, P, S, D] and natural-log lse [B, Hq, P, S]; shapes as in the public function, anchors [B, P]."""
    num_anchors, steps = query.shape[2:4]
    group = query.shape[1] // key.shape[1]
    keys = torch.cat([key, thought_key.flatten(2, 3)], dim=2).repeat_interleave(group, dim=1)
    values = torch.cat([value, thought_value.flatten(2, 3)], dim=2).repeat_interleave(group, dim=1)
    visible = visibility(key.shape[2], steps, thought_key.shape[3], anchors, key_start, window)
    visible = visible.flatten(1, 2)[:, None]  # [B, 1, P·S, L + P·T]
    active = visible.any(dim=-1, keepdim=True)

    accumulate = torch.promote_types(query.dtype, torch.float32)
    scores = (query.flatten(2, 3) @ keys.mT).to(accumulate) * scale
    scores = scores.masked_fill(~visible & active, -torch.inf)  # rows that see nothing stay finite: no NaN gradients
    lse = scores.logsumexp(dim=-1, keepdim=True)
    output = (scores - lse).exp().to(query.dtype) @ values
    output = output.where(active, 0).unflatten(2, (num_anchors, steps))
    lse = lse.where(active, -torch.inf)[..., 0].unflatten(2, (num_anchors, steps))
    return output, lse
