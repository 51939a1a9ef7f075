"""The training objective of Quiet-STaR (arXiv 2403.09629, section 4.4) from hidden states and labels.

No logits of size rows × V are kept: every term is one fused linear cross-entropy.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quietstar.models.configuration import QuietStarConfig
from quietstar.models.documents import IGNORE_INDEX, look_ahead, rewarded
from quietstar.models.entropy import thought_entropy
from quietstar.models.head import Head


class Objective(NamedTuple):
    """The loss and what it is made of. i is a base position, n a thought, m a look-ahead step, j a thought token."""

    loss: Tensor  # scalar, differentiable
    base_nll: Tensor  # [B, L−1], −log p of token i+1 without a thought; 0 where there is no label
    talk_nll: Tensor  # [B, N, L−1, M], −log p of token i+1+m after the thought behind i; 0 where there is no label
    reward: Tensor  # [B, N, L−1−M], sum over m of base_nll[i+m] − talk_nll[i, m]
    advantage: Tensor  # [B, N, L−1−M], what the policy term multiplies log p of the thought by
    policy_loss: Tensor  # scalar, before its weight
    thought_logprobs: Tensor | None  # [B, N, L−1, k], log p of the thought tokens at policy_temperature
    thought_entropy: Tensor | None  # scalar, mean entropy of what a thought token is drawn from, in nats


def quiet_star_objective(
    base_hidden: Tensor,
    thought_hidden: Tensor,
    mixing_weight: Tensor,
    head: Head,
    labels: Tensor,
    thought_tokens: Tensor,
    config: QuietStarConfig,
    starts: Tensor | None = None,
    output_thought_logprobs: bool = True,
    output_thought_entropy: bool = False,
) -> Objective:
    """Base loss, mixed ("talk") loss and REINFORCE term of one batch.

    Args:
        base_hidden: [B, L, H], final hidden states of the text.
        thought_hidden: [B, L−1, N, S, H], final hidden states of the thought slots: start, k tokens, end, M−1 real.
        mixing_weight: [B, L−1, N, M], weight of the thought prediction.
        head: makes predictions of hidden states.
        labels: int [B, L], −100 is ignored; from :func:`~quietstar.models.documents.text_labels`.
        thought_tokens: int [B, L−1, N, k].
        starts: where documents begin, see :mod:`quietstar.models.documents`.
        output_thought_logprobs: without them, thoughts of no advantage need no logits.
        output_thought_entropy: measure it, on a sample of the thoughts that have something to predict.
    """
    k, lookahead, num_thoughts = config.thought_length, config.lookahead, config.num_thoughts
    batch, length = labels.shape
    positions = length - 1
    device = labels.device

    # Every term comes out with its weight, so that the gradients made with it need no scaling.
    next_tokens = labels[:, 1:].flatten()
    base_count = (next_tokens != IGNORE_INDEX).sum().clamp_min(1)
    base_loss, base_nll = head.cross_entropy(
        base_hidden[:, :-1].flatten(0, 1),
        next_tokens,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        row_weight=(config.base_loss_weight / base_count).expand(next_tokens.shape),
        return_nll=True,
    )
    base_nll = base_nll.view(batch, positions)

    # Look-ahead m of the anchor at i predicts token i+m+1 and mixes with base position i+m; past the end: no label.
    ahead = torch.arange(positions, device=device)[:, None] + torch.arange(lookahead, device=device)  # [L−1, M]
    ahead = ahead.clamp_max(positions - 1)
    target = look_ahead(labels, lookahead, starts)  # [B, L−1, M]
    counts = (target != IGNORE_INDEX).sum(dim=(0, 1)) * num_thoughts  # [M]
    per_thought = (batch, positions, num_thoughts, lookahead)
    base_index = ahead + torch.arange(batch, device=device)[:, None, None] * length
    talk_loss, talk_nll = head.mixed_cross_entropy(
        base_hidden.flatten(0, 1),
        thought_hidden[:, :, :, k + 1 :].flatten(0, 3),
        mixing_weight.flatten(),
        target[:, :, None].expand(per_thought).flatten(),
        base_index=base_index[:, :, None].expand(per_thought).flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        row_weight=((1 - config.base_loss_weight) / (lookahead * counts.clamp_min(1))).expand(per_thought).flatten(),
        return_nll=True,
    )
    talk_nll = talk_nll.view(per_thought)

    base_ahead = base_nll[:, ahead].masked_fill(target == IGNORE_INDEX, 0)[:, :, None]  # [B, L−1, 1, M]
    reward = (base_ahead - talk_nll)[:, : length - 1 - lookahead].sum(dim=-1)  # [B, L−1−M, N]
    reward_count = reward.numel()
    if (within := rewarded(labels, lookahead, starts)) is not None:
        reward = reward.masked_fill(~within[:, :, None], 0)
        reward_count = within.sum().clamp_min(1) * num_thoughts
    advantage = (reward - reward.mean(dim=-1, keepdim=True) if num_thoughts > 1 else reward).clamp_min(0)

    loss = base_loss + talk_loss
    policy_loss = base_loss.new_zeros(())
    thought_nll = base_nll.new_zeros(batch, positions, num_thoughts, k)
    if k > 0:
        policy_weight = config.policy_weight or 1.0  # a term without weight is reported all the same
        row_weight = torch.zeros_like(thought_nll)
        row_weight[:, : reward.shape[1]] = advantage[..., None] * (policy_weight / (k * reward_count))
        result = head.cross_entropy(
            thought_hidden[:, :, :, :k].flatten(0, 3),
            thought_tokens.flatten(),
            temperature=config.policy_temperature,
            suppress=config.thought_token_ids,
            reduction="sum",
            row_weight=row_weight.flatten(),
            return_nll=output_thought_logprobs,
        )
        policy_term, thought_nll = result if output_thought_logprobs else (result, thought_nll)
        policy_loss = policy_term.detach() / policy_weight
        if config.policy_weight:
            loss = loss + policy_term

    entropy = None
    if output_thought_entropy:
        entropy = thought_entropy(thought_hidden[:, :, :, :k], head, (target != IGNORE_INDEX).any(dim=-1), config)
    return Objective(
        loss,
        base_nll,
        talk_nll.transpose(1, 2),
        reward.transpose(1, 2),
        advantage.transpose(1, 2),
        policy_loss,
        -thought_nll.view(batch, positions, num_thoughts, k).transpose(1, 2) if output_thought_logprobs else None,
        entropy,
    )
