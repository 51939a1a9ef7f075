"""The specification of thought attention: one dense mask over base and thought keys, and gradients by autograd."""

import torch
from torch import Tensor

from quietstar.ops._precision import widen
from quietstar.ops.thought_attention.inputs import Inputs, Mask, Result


def visibility(inputs: Inputs, mask: Mask) -> Tensor:
    """The thought mask, bool [1 or B, P, S, L + P·T]: which keys each query sees, thought keys anchor-major."""
    length, device = inputs.key.shape[2], inputs.query.device
    num_anchors, steps = inputs.query.shape[2:4]
    base = mask.sees_base(mask.anchors_in(length, device), mask.key_start, torch.arange(length, device=device), inputs)
    own = mask.sees_thought(mask.thought_lengths, inputs, device)[:, :, :, None]  # [1 or B, 1 or P, S, 1, T]
    itself = torch.eye(num_anchors, dtype=torch.bool, device=device)[:, None, :, None]  # [P, 1, P, 1]
    thought = (own & itself).flatten(3)
    batch = max(len(base), len(thought))
    parts = (part.expand(batch, num_anchors, steps, -1) for part in (base, thought))
    visible = torch.cat(list(parts), dim=-1)
    inactive = mask.inactive(inputs)
    return visible if inactive is None else visible & ~inactive[..., None]


def forward(inputs: Inputs, mask: Mask) -> Result:
    """Compute output and lse; differentiable by autograd, any number of times.

    Scores and sums are in float32 or wider. Keys and values that no row sees are zeroed first, since 0 · NaN is NaN.
    """
    num_anchors, steps = inputs.query.shape[2:4]
    visible = visibility(inputs, mask).flatten(1, 2)[:, None]  # [1 or B, 1, P·S, L + P·T]
    active = visible.any(dim=-1, keepdim=True)
    unseen = ~visible.any(dim=-2)[..., None]  # [1 or B, 1, L + P·T, 1]

    keys, values = (
        torch.cat([widen(base), widen(thought).flatten(2, 3)], dim=2)
        .masked_fill(unseen, 0)
        .repeat_interleave(inputs.group, dim=1)
        for base, thought in ((inputs.key, inputs.thought_key), (inputs.value, inputs.thought_value))
    )
    rows = widen(inputs.query).flatten(2, 3).masked_fill(~active, 0)
    scores = (rows @ keys.mT) * mask.scale
    if mask.softcap is not None:
        scores = mask.softcap * torch.tanh(scores / mask.softcap)
    scores = scores.masked_fill(~visible & active, -torch.inf)  # rows that see nothing stay finite: no NaN gradients
    lse = scores.logsumexp(dim=-1, keepdim=True)
    output = (scores - lse).exp() @ values
    output = output.where(active, 0).unflatten(2, (num_anchors, steps))
    lse = lse.where(active, -torch.inf)[..., 0].unflatten(2, (num_anchors, steps))
    return Result(output.to(inputs.query.dtype), lse)
