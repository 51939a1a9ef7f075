"""How sure a model is of its thoughts, measured while it trains."""

import torch
from torch import Tensor

from quietstar.models.configuration import QuietStarConfig
from quietstar.models.head import Head
from quietstar.models.lengths import lengths_of
from quietstar.ops._rows import BLOCK_BYTES, rows_within, slices

# Thought tokens that are looked at: a few of each pass are enough for a mean over many, and cost about one per cent.
TOKENS = 64


@torch.no_grad()
def thought_entropy(
    hidden: Tensor, head: Head, counted: Tensor, config: QuietStarConfig, tokens: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Mean entropy of the distributions that thought tokens are drawn from, in nats: a scalar, NaN without any.

    That is at ``thought_temperature`` and without the thought tokens that must not be drawn, also where
    ``policy_temperature`` is another. Of some thoughts, evenly spread, it is computed exactly from the logits of their
    tokens; of all of them if they have no more than ``TOKENS``. Nothing waits for the device.

    Args:
        hidden: [B, P, N, k, H], the states that thought tokens are drawn from.
        head: makes predictions of them.
        counted: bool [B, P], behind which positions thoughts count.
        config: of the model.
        tokens: int [B, P, N, k], the thoughts, if they end themselves: what was not drawn does not count, and what drew
            an end does.
    """
    batch, positions, num_thoughts, k, _ = hidden.shape
    thoughts = batch * positions * num_thoughts
    up_to = counted[:, :, None].expand(batch, positions, num_thoughts).flatten().cumsum(0)
    total = up_to[-1]
    ranks = torch.arange(min(thoughts, max(1, TOKENS // max(k, 1))), device=hidden.device)
    ranks = ranks * total // len(ranks)  # of the thoughts looked at, among those that count
    first = ranks.diff(prepend=ranks[:1] - 1) > 0  # with few that count, some come up more than once
    chosen = torch.searchsorted(up_to, ranks, right=True).clamp_max(thoughts - 1)
    rows = hidden.flatten(0, 2)[chosen].flatten(0, 1)
    parts = slices(len(rows), rows_within(BLOCK_BYTES, 4 * len(head.weight), rows.device))
    may_end = (torch.arange(k, device=rows.device) > 0).repeat(len(ranks)) & config.learned_thought_end
    entropy = [_entropy(rows[part], may_end[part], head, config) for part in parts]
    entropy = torch.cat(entropy) if k else rows.new_empty(0)
    entropy = entropy.view(len(ranks), k)
    if config.learned_thought_end:
        place = torch.arange(k, device=rows.device)
        drawn = (place <= lengths_of(tokens).flatten()[chosen, None]) & (first & (total > 0))[:, None]
        return torch.where(drawn, entropy, 0).sum() / drawn.sum()
    means = entropy.mean(dim=1)
    return torch.where(first & (total > 0), means, 0).sum() / torch.where(total > 0, first.sum(), 0)


def _entropy(hidden: Tensor, may_end: Tensor, head: Head, config: QuietStarConfig) -> Tensor:
    """Of one distribution each, float32 [rows]."""
    if config.thought_temperature == 0:  # greedy thoughts
        return torch.zeros(len(hidden), device=hidden.device)
    logits = head.logits(hidden).float() / config.thought_temperature
    start, end = config.thought_token_ids
    logits[:, start] = -torch.inf
    logits[:, end] = logits[:, end].masked_fill(~may_end, -torch.inf)
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)
