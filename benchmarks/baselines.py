"""What the Quiet-STaR authors' training code does, operation by operation, to be compared with.

The mathematics is that of the paper (arXiv:2403.09629) and of ``QuietStarForCausalLM``; the way it is computed is the
authors' (github.com/ezelikman/quiet-star, ``modeling_mistral.py``):

- the batch is repeated N times, once per thought of a position, base text included;
- thoughts grow one step at a time: step s runs all L positions of all rows through the model against the keys and
  values of every earlier step, concatenated into one cache, under a dense additive mask [rows, 1, L, L * (s + 1)];
  a token sees base keys up to its own position and, of each later step, the diagonal;
- attention is the library's scaled-dot-product attention with that mask and with key/value heads repeated;
- every step projects to the whole vocabulary twice, once for the next thought token and once for the mixed prediction,
  and takes the cross-entropy of a copy of the latter, although only the base step and the last M steps enter the loss;
- thought tokens are drawn by a straight-through Gumbel softmax, detached; drawn and forced tokens are one-hot rows
  [rows, L, V] that are multiplied with the embedding matrix, also after the last step, where nothing uses the result;
- the token a thought took is found again by searching all one-hot rows for what is not zero;
- the cross-entropy of the base prediction is evaluated anew for every look-ahead;
- there is one backward through all steps, so whatever it needs is kept until then.

Left out: logging, and checks that a step's tokens are not already known.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MistralConfig

IGNORE = -100


class SequentialStep(NamedTuple):
    """One step of the sequential program. R = batch * num_thoughts rows; row r is of sequence r // num_thoughts."""

    loss: Tensor
    """The total, a differentiable scalar."""
    base_nll: Tensor
    """[R, L-1], 0 where there is no label, as in ``talk_nll``."""
    talk_nll: Tensor
    """[R, L-1, M]: entry (i, m) is anchor i's mixed loss on token i+m+1."""
    reward: Tensor
    """[R, L-1-M], before the mean over the thoughts of a position is taken off."""
    policy_loss: Tensor
    """Scalar, before ``policy_weight``."""
    thought_tokens: list[Tensor]
    """Those of each thinking step, k times [R, L]; stacked on a last axis they are what the function takes."""
    thought_logprobs: list[Tensor]
    """Theirs at ``policy_temperature``, k times [R, L]."""


def model_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a ``QuietStarForCausalLM`` under the names ``sequential_training_step`` takes."""
    # Tied embeddings are listed once among the parameters, under their other name.
    return dict(model.named_parameters()) | {"lm_head.weight": model.lm_head.weight}


def authors_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the authors' layout under the names ``sequential_training_step`` takes.

    Their thought embeddings are [2, H] and only row 0 is used. Views are taken, so gradients reach the originals.
    """
    renamed = {name.replace("talk_head.0", "mixing_head"): tensor for name, tensor in weights.items()}
    return renamed | {f"{name}.weight": weights[name][0] for name in ("start_embedding", "end_embedding")}


def sequential_training_step(
    weights: Mapping[str, Tensor],
    config: MistralConfig,
    input_ids: Tensor,
    labels: Tensor,
    *,
    attention_mask: Tensor | None = None,
    thought_tokens: Tensor | None = None,
) -> SequentialStep:
    """Forward of one training step, ready for ``.loss.backward()``.

    Args:
        weights: from ``model_weights`` or ``authors_weights``.
        config: a ``QuietStarConfig``, or a ``MistralConfig`` with the same extra attributes.
        input_ids: [B, L].
        labels: [B, L], not shifted, -100 is ignored.
        attention_mask: [B, L], 0 on right padding; None is all ones.
        thought_tokens: [B * num_thoughts, L, thought_length] to use instead of sampling.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    input_ids, labels, attention_mask = (
        tensor.repeat_interleave(config.num_thoughts, dim=0) for tensor in (input_ids, labels, attention_mask)
    )
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    start, end = (weights[f"{name}_embedding.weight"] * config.embedding_scale for name in ("start", "end"))
    decoder = _Decoder(weights, config)
    length = input_ids.shape[1]
    position_ids = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    real = attention_mask[:, None, None, :].bool()
    mask = _additive(torch.ones(length, length, device=input_ids.device).tril().bool() & real, embedding.dtype)

    # Step 0 is the base text, 1 the start token, then k sampled tokens, the end token and M - 1 tokens of the text.
    end_step = config.thought_length + 2
    inputs = F.embedding(input_ids, embedding)
    nll, base_again, sampled, logprobs = [], [], [], []
    choice = previous_choice = scores = None
    for step in range(end_step + config.lookahead):
        hidden = decoder(inputs, mask, position_ids + step)
        ahead = max(0, step - end_step)
        if step == 0:
            base_hidden = hidden.clone()
            logits = F.linear(hidden, head)
            initial_logits = logits.clone()
        else:
            shifted = torch.cat([base_hidden[:, ahead:], base_hidden[:, :ahead]], dim=1)
            logits = _project(head, _mix(weights, shifted, hidden))

        next_logits = _project(head, hidden)
        next_logits[..., config.start_thought_token_id] = -1e10
        next_logits[..., config.end_thought_token_id] = -1e10
        if choice is not None:
            previous_choice = choice.clone()
        previous_scores, scores = scores, None
        if step in (0, end_step - 1):
            token = config.start_thought_token_id if step == 0 else config.end_thought_token_id
            choice = _forced(token, next_logits)
        elif step < end_step - 1:
            scores = next_logits
            if thought_tokens is None:
                choice = F.gumbel_softmax(scores, tau=1, hard=True).detach()
            else:
                choice = _one_hot(thought_tokens[..., step - 1], embedding)
            sampled.append(choice.argmax(dim=-1))
        else:
            following = torch.cat([input_ids[:, ahead + 1 :], torch.zeros_like(input_ids[:, : ahead + 1])], dim=1)
            choice = _one_hot(following, embedding)
        inputs = _embedded(choice, embedding, start, end, config)
        mask = torch.cat([mask, _diagonal(mask[..., :length])], dim=-1)

        nll.append(_shifted_nll(logits, labels, shift=ahead + 1))
        if step >= end_step:
            base_again.append(_shifted_nll(initial_logits[:, ahead:].detach(), labels[:, ahead:], shift=1))
        if previous_scores is not None:
            rows, tokens = previous_choice.flatten(0, 1).nonzero().unbind(dim=1)
            policy = torch.log_softmax(previous_scores.flatten(0, 1) / config.policy_temperature, dim=-1)
            logprobs.append(policy[rows, tokens].view_as(input_ids))

    return _objective(config, labels, nll[0], nll[-config.lookahead :], base_again, sampled, logprobs)


@torch.no_grad()
def sequential_next_logits(
    weights: Mapping[str, Tensor], config: MistralConfig, input_ids: Tensor, *, greedy_thoughts: bool = False
) -> Tensor:
    """Mixed logits [B, V] behind the last token of [B, L], as the authors' inference script gets them for every token.

    Nothing is kept from token to token: the whole text runs through the model anew, with a thought behind every
    position, in the steps of ``sequential_training_step`` up to the end token, of which each makes both its
    predictions. Their temperature of thoughts at inference, 0.001, divides logits and noise alike, so that thoughts
    are sampled as in training; ``greedy_thoughts`` takes the most likely tokens instead.
    """
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    start, end = (weights[f"{name}_embedding.weight"] * config.embedding_scale for name in ("start", "end"))
    decoder = _Decoder(weights, config)
    length = input_ids.shape[1]
    position_ids = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    causal = torch.ones(length, length, device=input_ids.device).tril().bool()
    mask = _additive(causal.expand(len(input_ids), 1, -1, -1), embedding.dtype)
    inputs = F.embedding(input_ids, embedding)
    end_step = config.thought_length + 2
    for step in range(end_step + 1):
        hidden = decoder(inputs, mask, position_ids + step)
        if step == 0:
            base_hidden = hidden.clone()
            logits = F.linear(hidden, head)
        else:
            logits = _project(head, _mix(weights, base_hidden, hidden))
        scores = _project(head, hidden)
        scores[..., [config.start_thought_token_id, config.end_thought_token_id]] = -1e10
        if step == end_step:
            return logits[:, -1]
        if step in (0, end_step - 1):
            choice = _forced(config.start_thought_token_id if step == 0 else config.end_thought_token_id, scores)
        elif greedy_thoughts:
            choice = _one_hot(scores.argmax(dim=-1), embedding)
        else:
            choice = F.gumbel_softmax(scores, tau=0.001, hard=True)
        choice.argmax(dim=-1).cpu()  # for a history they keep on the host
        inputs = _embedded(choice, embedding, start, end, config)
        mask = torch.cat([mask, _diagonal(mask[..., :length])], dim=-1)


def _objective(
    config: MistralConfig,
    labels: Tensor,
    base_nll: Tensor,
    talk_nll: list[Tensor],
    base_again: list[Tensor],
    sampled: list[Tensor],
    logprobs: list[Tensor],
) -> SequentialStep:
    """Put the pieces together: losses are means over labels, the policy term over positions, labelled or not."""
    lookahead = config.lookahead
    anchors = labels.shape[1] - 1 - lookahead
    count = [(labels[:, shift:] != IGNORE).sum() for shift in range(1, lookahead + 1)]
    talk_loss = sum(nll.sum() / count[m] for m, nll in enumerate(talk_nll)) / lookahead
    loss = config.base_loss_weight * base_nll.sum() / count[0] + (1 - config.base_loss_weight) * talk_loss

    reward = sum(base[:, :anchors] - nll[:, :anchors].detach() for base, nll in zip(base_again, talk_nll, strict=True))
    advantage = reward
    if config.num_thoughts > 1:
        per_position = reward.unflatten(0, (-1, config.num_thoughts))
        advantage = (per_position - per_position.mean(dim=1, keepdim=True)).flatten(0, 1)
    policy_loss = loss.new_zeros(())
    if logprobs:
        policy_loss = torch.stack([-(advantage.clamp(min=0) * p[:, :anchors]).mean() for p in logprobs]).mean()
        loss = loss + config.policy_weight * policy_loss
    padded = torch.stack([F.pad(nll, (0, m)) for m, nll in enumerate(talk_nll)], dim=-1)
    return SequentialStep(loss, base_nll, padded, reward, policy_loss, sampled, logprobs)


class _Decoder:
    """The Mistral decoder, called once per step; remembers the keys and values of all calls."""

    def __init__(self, weights: Mapping[str, Tensor], config: MistralConfig) -> None:
        self.weights, self.config = weights, config
        self.cache: list[tuple[Tensor, Tensor] | None] = [None] * config.num_hidden_layers

    def __call__(self, hidden: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        """[R, L, H] inputs at positions [R, L] under the additive mask [R, 1, L, keys so far] -> [R, L, H], normed."""
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            normed = self._norm(f"{prefix}.input_layernorm", hidden)
            hidden = hidden + self._attention(layer, f"{prefix}.self_attn", normed, mask, position_ids)
            normed = self._norm(f"{prefix}.post_attention_layernorm", hidden)
            gate, up = (self._linear(f"{prefix}.mlp.{name}_proj", normed) for name in ("gate", "up"))
            hidden = hidden + self._linear(f"{prefix}.mlp.down_proj", F.silu(gate) * up)
        return self._norm("model.norm", hidden)

    def _attention(self, layer: int, prefix: str, normed: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        query, key, value = (
            self._linear(f"{prefix}.{name}_proj", normed).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for name in "qkv"
        )
        query, key = (self._rotate(states, position_ids) for states in (query, key))
        if self.cache[layer] is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(self.cache[layer], (key, value), strict=True))
        self.cache[layer] = key, value
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self._linear(f"{prefix}.o_proj", attended.transpose(1, 2).flatten(2))

    def _rotate(self, states: Tensor, position_ids: Tensor) -> Tensor:
        """Rotary position embedding of [R, heads, L, D]: dimension d is paired with d + D/2."""
        exponent = torch.arange(0, self.config.head_dim, 2, device=states.device) / self.config.head_dim
        angles = position_ids[:, None, :, None] / self.config.rope_parameters["rope_theta"] ** exponent
        angles = torch.cat([angles, angles], dim=-1)
        first, second = states.chunk(2, dim=-1)
        return states * angles.cos().to(states.dtype) + torch.cat([-second, first], dim=-1) * angles.sin().to(
            states.dtype
        )

    def _linear(self, name: str, states: Tensor) -> Tensor:
        return F.linear(states, self.weights[f"{name}.weight"])

    def _norm(self, name: str, states: Tensor) -> Tensor:
        wide = states.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.config.rms_norm_eps)
        return self.weights[f"{name}.weight"] * wide.to(states.dtype)


def _project(head: Tensor, hidden: Tensor) -> Tensor:
    """Logits [R, L, V] of hidden states [R, L, H]."""
    return (head @ hidden.transpose(-1, -2)).transpose(-1, -2).contiguous()


def _mix(weights: Mapping[str, Tensor], base: Tensor, thought: Tensor) -> Tensor:
    """(1 - w) base + w thought, [R, L, H], with the weight w from the mixing head."""
    features = torch.cat([base, thought], dim=-1)
    for name in ("mixing_head.0", "mixing_head.2"):
        features = F.linear(features, weights[f"{name}.weight"], weights[f"{name}.bias"]).relu()
    w = F.linear(features, weights["mixing_head.4.weight"])
    return (1 - w) * base + w * thought


def _shifted_nll(logits: Tensor, labels: Tensor, *, shift: int) -> Tensor:
    """Cross-entropy [R, L - shift] of position i's logits against label i + shift; 0 where it is ignored."""
    shifted = labels[:, shift:].contiguous()
    logits = logits[:, :-shift].contiguous().flatten(0, 1)
    nll = F.cross_entropy(logits, shifted.flatten(), ignore_index=IGNORE, reduction="none")
    if torch.isnan(nll).any():
        raise ValueError("the loss is NaN")
    return nll.view_as(shifted)


def _forced(token: int, like: Tensor) -> Tensor:
    """One-hot rows [R, L, V] of one token everywhere."""
    choice = torch.zeros_like(like)
    choice[..., token] = 1
    return choice


def _embedded(choice: Tensor, embedding: Tensor, start: Tensor, end: Tensor, config: MistralConfig) -> Tensor:
    """Inputs [R, L, H] of the next step for one-hot rows [R, L, V]."""
    if choice[..., config.start_thought_token_id].sum() > 0:
        return start.repeat(*choice.shape[:2], 1)
    if choice[..., config.end_thought_token_id].sum() > 0:
        return end.repeat(*choice.shape[:2], 1)
    return choice @ embedding


def _one_hot(tokens: Tensor, embedding: Tensor) -> Tensor:
    return F.one_hot(tokens, embedding.shape[0]).to(embedding.dtype)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def _diagonal(mask: Tensor) -> Tensor:
    """The additive mask of a step's own keys, given that of the base keys: the diagonal where the key is visible."""
    visible = torch.eye(mask.shape[-1], dtype=mask.dtype, device=mask.device).repeat(mask.shape[0], 1, 1, 1)
    visible = visible * (mask == mask.max())
    return torch.where(visible == 0, mask.min(), mask.max())
