"""The training objective: losses of the text without and after thoughts, and the policy gradient for thoughts.

The configuration's defaults give the objective of Quiet-STaR (arXiv 2403.09629, section 4.4); other values give RLP,
LaTRO, JEPO, VeriFree and others, see docs/methods.md. Terms are computed from hidden states and labels, each by one
fused linear cross-entropy, so that no logits [rows, V] are stored.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from quietstar.models.anchors import Ahead, predicted_from, select
from quietstar.models.configuration import QuietStarConfig
from quietstar.models.documents import IGNORE_INDEX
from quietstar.models.entropy import thought_entropy
from quietstar.models.head import Head
from quietstar.models.lengths import drawn_tokens


class Objective(NamedTuple):
    """The loss and its parts. i is a base position, n a thought, m a look-ahead step, j a thought token.

    Unless anchors were chosen, A = L−1 (every position with something to predict), of which R = L−1−M are rewarded.
    """

    loss: Tensor  # scalar, differentiable
    base_nll: Tensor  # [B, L−1], −log p of token i+1 without a thought; 0 where there is no label
    talk_nll: Tensor  # [B, N, A, M], −log p of token i+1+m after the thought at i; 0 where there is no label
    reward: Tensor  # [B, N, R], reward of the thought at i: see ``_rewards``
    advantage: Tensor  # [B, N, R], factor of the thought's log p in the policy term
    policy_loss: Tensor  # scalar, before its weight
    thought_logprobs: Tensor | None  # [B, N, A, k], log p of the thought tokens at policy_temperature
    thought_entropy: Tensor | None  # scalar, mean entropy of the distributions of thought tokens, in nats


class Given(NamedTuple):
    """Tensors from outside the pass that the objective compares with."""

    baseline_nll: Tensor | None = None  # [B, L−1], a teacher's
    teacher_logprobs: Tensor | None = None  # [B, N, A, k], a teacher's, of the thought tokens
    old_logprobs: Tensor | None = None  # [B, N, A, k], those at the time of sampling

    def check(self, config: QuietStarConfig, text: tuple[int, int], thoughts: tuple[int, ...]) -> None:
        """Check that exactly the tensors that the configuration needs are given, in the right shapes.

        Args:
            config: the model's configuration.
            text: B and L.
            thoughts: B, N, A and k.

        Raises:
            TypeError, ValueError: a tensor is missing or not needed, or has the wrong shape.
        """
        wanted = {
            "baseline_nll": (config.baseline == "teacher", "baseline 'teacher'", (text[0], text[1] - 1)),
            "teacher_logprobs": (config.kl_weight > 0, "a kl_weight", thoughts),
            "old_logprobs": (config.clip_ratio is not None, "a clip_ratio", thoughts),
        }
        for name, (needed, switch, shape) in wanted.items():
            value = getattr(self, name)
            if value is None and (not needed or name == "old_logprobs"):  # the first update has no old ones
                continue
            if (value is not None) != needed:
                raise ValueError(
                    f"{name} must be {'given' if needed else 'left out'} {'with' if needed else 'without'} {switch}"
                )
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")


_NOTHING = Given()


def likelihood_objective(
    base_hidden: Tensor,
    drawn_from: Tensor,
    thought_hidden: Tensor,
    mixing_weight: Tensor,
    head: Head,
    labels: Tensor,
    thought_tokens: Tensor,
    config: QuietStarConfig,
    starts: Tensor | None = None,
    anchors: Tensor | None = None,
    given: Given = _NOTHING,
    output_thought_logprobs: bool = True,
    output_thought_entropy: bool = False,
) -> Objective:
    """Compute the losses of the text without and after thoughts, and the policy term, for one batch.

    Args:
        base_hidden: [B, L, H], final hidden states of the text.
        drawn_from: [B, A, N, k, H], final hidden states that thought tokens are drawn from: at the start token and at
            all thought tokens except the last.
        thought_hidden: [B, A, N, M, H], final hidden states at the end token and at M−1 real tokens.
        mixing_weight: [B, A, N, M], weight of the thought's prediction.
        head: computes predictions from hidden states.
        labels: int [B, L], −100 is ignored; from ``text_labels``.
        thought_tokens: int [B, A, N, k], −1 for none.
        starts: where documents begin, see ``quietstar.models.documents``.
        anchors: int64 [B, A], positions that think, −1 for none; None means every position except the last.
        given: the tensors that the configuration's ``baseline``, ``kl_weight`` and ``clip_ratio`` need.
        output_thought_logprobs: whether to return them; if not, thoughts without advantage need no logits.
        output_thought_entropy: whether to measure it, on a sample of the thoughts that have something to predict.
    """
    k = config.thought_length
    ahead = predicted_from(labels, config.lookahead, starts, anchors)
    base_loss, base_nll = _base_loss(base_hidden, head, labels, config)
    talk_loss, talk_nll = _talk_loss(base_hidden, thought_hidden, mixing_weight, head, ahead, config)
    policy = _Policy(drawn_from, thought_tokens, head, config)
    reward = _rewards(base_nll if config.baseline == "self" else given.baseline_nll, talk_nll, ahead, config)
    count = reward.numel()
    if ahead.rewarded is not None:
        reward = reward.masked_fill(~ahead.rewarded[:, :, None], 0)
        count = ahead.rewarded.sum().clamp_min(1) * config.num_thoughts
    cost = policy.cost(given.teacher_logprobs) if config.kl_weight else None
    advantage = _advantages(reward, None if cost is None else cost[:, : ahead.count], ahead.rewarded, config)

    loss = base_loss + talk_loss
    policy_loss, thought_nll = base_loss.new_zeros(()), None
    if k > 0:
        term, policy_loss, thought_nll = policy.term(
            advantage, ahead, count, given.old_logprobs, output_thought_logprobs
        )
        if term is not None:
            loss = loss + term

    entropy = None
    if output_thought_entropy:
        counted = (ahead.target != IGNORE_INDEX).any(dim=-1)
        entropy = thought_entropy(drawn_from, head, counted, config, thought_tokens)
    if output_thought_logprobs and thought_nll is None:
        thought_nll = base_nll.new_zeros(thought_tokens.shape)
    return Objective(
        loss,
        base_nll,
        talk_nll.transpose(1, 2),
        reward.transpose(1, 2),
        advantage.transpose(1, 2),
        policy_loss,
        -thought_nll.view(thought_tokens.shape).transpose(1, 2) if output_thought_logprobs else None,
        entropy,
    )


def _base_loss(base_hidden: Tensor, head: Head, labels: Tensor, config: QuietStarConfig) -> tuple[Tensor, Tensor]:
    """Return the weighted loss of the text without thoughts, and its nll [B, L−1].

    Here and below, terms are computed with their weights, so that their gradients need no scaling later.
    """
    next_tokens = labels[:, 1:].flatten()
    weight = config.text_loss_weights[0]
    cross_entropy = partial(
        head.cross_entropy, base_hidden[:, :-1].flatten(0, 1), next_tokens, ignore_index=IGNORE_INDEX
    )  # fmt: skip
    if weight == 0:
        loss, nll = _without_loss(cross_entropy)
    else:
        count = (next_tokens != IGNORE_INDEX).sum().clamp_min(1)
        row_weight = (weight / count).expand(next_tokens.shape)
        loss, nll = cross_entropy(reduction="sum", row_weight=row_weight, return_nll=True)
    return loss, nll.view(len(labels), -1)


@torch.no_grad()
def _without_loss(cross_entropy: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Return a loss of 0 and the nll of its rows. This takes one product with the head; gradients would take three."""
    nll = cross_entropy(reduction="none")
    return nll.new_zeros(()), nll


def _talk_loss(
    base_hidden: Tensor, hidden: Tensor, mixing_weight: Tensor, head: Head, ahead: Ahead,
    config: QuietStarConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the weighted loss of the text after thoughts, and its nll [B, A, N, M].

    Args:
        hidden: [B, A, N, M, H], hidden states at the end token and the real tokens after it.
    """
    lookahead, num_thoughts = config.lookahead, config.num_thoughts
    batch, length = base_hidden.shape[:2]
    per_thought = hidden.shape[:4]
    counts = (ahead.target != IGNORE_INDEX).sum(dim=(0, 1)) * num_thoughts  # [M]
    weight = config.text_loss_weights[1]
    row_weight = (weight / (lookahead * counts.clamp_min(1))).expand(per_thought)
    rows = ahead.target[:, :, None].expand(per_thought).flatten()
    if config.prediction == "thought":
        cross_entropy = partial(head.cross_entropy, hidden.flatten(0, 3), rows, ignore_index=IGNORE_INDEX)
        if weight == 0:  # the mixing head still gets gradients (0), which distributed training expects
            loss, nll = _without_loss(cross_entropy)
            return loss, nll.view(per_thought)
    else:
        index = ahead.index + torch.arange(batch, device=rows.device)[:, None, None] * length
        index = index[:, :, None].expand(per_thought).flatten()
        cross_entropy = partial(
            head.mixed_cross_entropy, base_hidden.flatten(0, 1), hidden.flatten(0, 3), mixing_weight.flatten(), rows,
            base_index=index, ignore_index=IGNORE_INDEX,
        )  # fmt: skip

    if config.reward != "log_likelihood":  # the gradient of a likelihood has the likelihood as a factor
        with torch.no_grad():
            score = -cross_entropy(reduction="none").view(per_thought).sum(dim=-1)
        share = score.exp() if config.reward == "likelihood" else score.softmax(dim=-1) * num_thoughts
        row_weight = row_weight * share[..., None]
    loss, nll = cross_entropy(reduction="sum", row_weight=row_weight.flatten(), return_nll=True)
    return loss, nll.view(per_thought)


def _rewards(baseline_nll: Tensor | None, talk_nll: Tensor, ahead: Ahead, config: QuietStarConfig) -> Tensor:
    """Compute the rewards of the thoughts at the first R anchors, [B, R, N].

    A reward is the sum over m of baseline_nll[i+m] − talk_nll[i, m] or, if ``reward`` is "likelihood", the difference
    of the likelihoods. If ``baseline`` is "none", its nll, or its likelihood, is 0.
    """
    gain = -talk_nll
    if config.baseline != "none":
        at = select(baseline_nll, ahead.index, ahead.index.dim() == 3)
        baseline = at.masked_fill(ahead.target == IGNORE_INDEX, 0)[:, :, None]  # [B, A, 1, M]
        gain = baseline - talk_nll
    if config.reward != "likelihood":
        return gain[:, : ahead.count].sum(dim=-1)
    likelihood = (-talk_nll[:, : ahead.count].sum(dim=-1)).exp()
    if config.baseline == "none":
        return likelihood
    return likelihood - (-baseline[:, : ahead.count].sum(dim=-1)).exp()


def _advantages(
    reward: Tensor, cost: Tensor | None, rewarded: Tensor | None, config: QuietStarConfig
) -> Tensor:  # fmt: skip
    """Compute the advantages of thoughts, [B, R, N], from their rewards and their KL costs."""
    if config.reward == "log_mean":
        advantage = _of_log_mean(reward, config.advantage)
        if cost is not None:
            advantage = advantage - _centred(cost, config.advantage)
    else:
        advantage = _centred(reward if cost is None else reward - cost, config.advantage)
    if rewarded is not None:
        advantage = advantage.masked_fill(~rewarded[:, :, None], 0)
    if config.normalize_advantage:
        counted = torch.ones_like(advantage) if rewarded is None else rewarded[:, :, None].expand_as(advantage)
        count = counted.sum().clamp_min(1)
        deviation = (((advantage - advantage.sum() / count) * counted).square().sum() / count).sqrt()
        advantage = torch.where(deviation > 0, advantage / deviation, advantage)
    return advantage.clamp_min(0) if config.advantage_clamp else advantage


def _centred(reward: Tensor, how: str) -> Tensor:
    """Subtract from rewards [..., N] those of the same position, as ``how`` says."""
    num_thoughts = reward.shape[-1]
    if how == "none" or num_thoughts == 1:
        return reward
    advantage = reward - reward.mean(dim=-1, keepdim=True)
    return advantage * (num_thoughts / (num_thoughts - 1)) if how == "leave_one_out" else advantage


def _of_log_mean(reward: Tensor, how: str) -> Tensor:
    """Compute the logarithm of the mean of N likelihoods, unchanged or minus that of the other thoughts (JEPO)."""
    num_thoughts = reward.shape[-1]
    whole = reward.logsumexp(dim=-1, keepdim=True) - math.log(num_thoughts)
    if how == "none":
        return whole.expand_as(reward)
    own = torch.eye(num_thoughts, dtype=torch.bool, device=reward.device)
    others = reward[..., None, :].masked_fill(own, -torch.inf).logsumexp(dim=-1) - math.log(num_thoughts - 1)
    return whole - others


class _Policy:
    """The policy that thoughts were drawn from.

    Args:
        hidden: [B, A, N, k, H], the states that thought tokens are drawn from.
        tokens: int [B, A, N, k]; negative where there is none.
        head: computes predictions from hidden states.
        config: the model's configuration.
    """

    def __init__(self, hidden: Tensor, tokens: Tensor, head: Head, config: QuietStarConfig):
        self.hidden, self.head, self.config = hidden, head, config
        if config.learned_thought_end:
            self.tokens = drawn_tokens(tokens, config.end_thought_token_id, IGNORE_INDEX)
        else:
            self.tokens = tokens.masked_fill(tokens < 0, IGNORE_INDEX)
        self._known: Tensor | None = None

    def nll(self) -> Tensor:
        """Compute the nll of each token, [B, A, N, k], without gradient."""
        if self._known is None:
            with torch.no_grad():
                self._known = self._cross_entropy(reduction="none")
        return self._known

    def cost(self, teacher_logprobs: Tensor) -> Tensor:
        """Compute kl_weight · Σ_j (log p − log p of the teacher), [B, A, N]."""
        return self.config.kl_weight * (-self.nll() - teacher_logprobs.transpose(1, 2)).sum(dim=-1)

    def term(
        self, advantage: Tensor, ahead: Ahead, count: int | Tensor, old_logprobs: Tensor | None, return_nll: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return the weighted term (None for weight 0), the unweighted one to report, and, if requested, token nll.

        Args:
            advantage: [B, R, N].
            ahead: what is predicted from the anchors.
            count: number of rewarded thoughts.
            old_logprobs: see ``Given``.
            return_nll: whether to return the nll of all tokens.
        """
        config, k = self.config, self.config.thought_length
        weight = config.policy_weight or 1.0  # a term of weight 0 is still reported
        row_weight = torch.zeros(self.tokens.shape, dtype=advantage.dtype, device=advantage.device)
        rewarded = row_weight[:, : ahead.count]
        rewarded[:] = advantage[..., None] * (weight / (k * count))
        if old_logprobs is not None and config.clip_ratio is not None:
            ratio = (-self.nll() - old_logprobs.transpose(1, 2)).exp()[:, : ahead.count]
            clipped = torch.where(
                advantage[..., None] > 0, ratio > 1 + config.clip_ratio, ratio < 1 - config.clip_ratio
            )
            rewarded *= ratio.masked_fill(clipped, 0)
        if not config.entropy_weight:
            result = self._cross_entropy(reduction="sum", row_weight=row_weight, return_nll=return_nll)
            term, nll = result if return_nll else (result, None)
            return term if config.policy_weight else None, term.detach() / weight, nll
        bonus = torch.zeros_like(row_weight)
        within = 1.0 if ahead.rewarded is None else ahead.rewarded[:, :, None, None].to(bonus.dtype)
        bonus[:, : ahead.count] = within * (config.entropy_weight / (k * count))
        term, nll = self._cross_entropy(
            reduction="sum", row_weight=row_weight if config.policy_weight else 0 * row_weight, entropy_weight=bonus,
            return_nll=True,
        )  # fmt: skip
        return term, (row_weight * nll).sum() / weight, nll

    def _cross_entropy(self, **options):
        """The head's cross-entropy of all tokens; row_weight, entropy_weight and nll are [B, A, N, k]."""
        suppress = self.config.thought_token_ids
        if not self.config.learned_thought_end:
            return self._of_tokens(slice(None), suppress, **options)
        first = self._of_tokens(slice(0, 1), suppress, **options)
        others = self._of_tokens(slice(1, None), suppress[:1], **options)  # the end token may be drawn there
        if options["reduction"] == "none":
            return torch.cat([first, others], dim=3)
        if not options.get("return_nll"):
            return first + others
        return first[0] + others[0], torch.cat([first[1], others[1]], dim=3)

    def _of_tokens(self, which: slice, suppress: tuple[int, ...], **options):
        tokens = self.tokens[..., which]
        options = {name: x[..., which].flatten() if isinstance(x, Tensor) else x for name, x in options.items()}
        result = self.head.cross_entropy(
            self.hidden[:, :, :, which].flatten(0, 3),
            tokens.flatten(),
            temperature=self.config.policy_temperature,
            suppress=suppress,
            **options,
        )
        if options["reduction"] == "none":
            return result.view(tokens.shape)
        return (result[0], result[1].view(tokens.shape)) if options.get("return_nll") else result
