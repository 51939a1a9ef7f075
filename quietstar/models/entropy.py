"""The entropy of thought tokens, measured during training."""

import torch
from torch import Tensor

from quietstar.models.configuration import QuietStarConfig
from quietstar.models.head import Head
from quietstar.models.lengths import lengths_of
from quietstar.ops._rows import BLOCK_BYTES, rows_within, slices

# Thought tokens measured per pass: a few are enough for a mean over many passes, and cost about one per cent.
TOKENS = 64


@torch.no_grad()
def thought_entropy(
    hidden: Tensor, head: Head, counted: Tensor, config: QuietStarConfig, tokens: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Compute the mean entropy, in nats, of the distributions that thought tokens are drawn from (a scalar).

    The distributions are those at ``thought_temperature``, without the special tokens that must not be drawn, even if
    ``policy_temperature`` differs. The entropy is exact for an evenly spread sample of thought tokens, or for all if
    there are at most ``TOKENS``; NaN if there are none. Nothing waits for the device.

    Args:
        hidden: [B, P, N, k, H], the states that thought tokens are drawn from.
        head: computes predictions from them.
        counted: bool [B, P], the positions whose thoughts count.
        config: the model's configuration.
        tokens: int [B, P, N, k], the thoughts, if they have learned lengths: draws of an end token count, places where
            nothing was drawn do not.
    """
    batch, positions, num_thoughts, k, _ = hidden.shape
    thoughts = batch * positions * num_thoughts
    up_to = counted[:, :, None].expand(batch, positions, num_thoughts).flatten().cumsum(0)
    total = up_to[-1]
    ranks = torch.arange(min(thoughts, max(1, TOKENS // max(k, 1))), device=hidden.device)
    ranks = ranks * total // len(ranks)  # of the sampled thought tokens, among those that count
    first = ranks.diff(prepend=ranks[:1] - 1) > 0  # if few count, some are sampled more than once
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
    """Compute the entropy of each row's distribution, float32 [rows]."""
    if config.thought_temperature == 0:  # greedy thoughts
        return torch.zeros(len(hidden), device=hidden.device)
    logits = head.logits(hidden).float() / config.thought_temperature
    start, end = config.thought_token_ids
    logits[:, start] = -torch.inf
    logits[:, end] = logits[:, end].masked_fill(~may_end, -torch.inf)
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)
