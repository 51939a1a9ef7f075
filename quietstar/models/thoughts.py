"""Thinking: running the layers over thought steps, and sampling thoughts behind a finished base pass."""

import torch
from torch import Tensor
from transformers.models.mistral.modeling_mistral import MistralModel

from quietstar.models.attention import BaseStates, TextCache, ThoughtCache, ThoughtStates, ThoughtTree
from quietstar.ops import linear_sample


def run_layers(
    model: MistralModel, embeddings: Tensor, position_ids: Tensor, thoughts: TextCache | ThoughtCache | ThoughtTree
) -> Tensor:
    """Final hidden states [B, rows, H] of rows whose attention ``thoughts`` lays out.

    Transformers' own forward would build a causal mask over all rows; here the layout is the mask.
    """
    hidden = embeddings
    position_embeddings = model.rotary_emb(hidden, position_ids)
    for layer in model.layers:
        hidden = layer(hidden, position_ids=position_ids, position_embeddings=position_embeddings, thoughts=thoughts)
    return model.norm(hidden)


class Thinker:
    """Thinks behind anchors of a base pass: samples thoughts and gives the hidden state at their end.

    Args:
        model: the decoder.
        lm_head: [V, H].
        base: the kept states of the base pass.
        anchors: int [B, P], indices into the base keys, −1 inactive.
        anchor_positions: int [B, P], position ids of the anchors.
        start, end: embeddings [H] of the thought tokens.
        thought_length: k.
        key_start: int [B] or None, first base key that is not left padding.
        states: room for the thoughts' keys and values, to be reused; default new.
    """

    def __init__(
        self,
        model: MistralModel,
        lm_head: Tensor,
        base: BaseStates | TextCache,
        anchors: Tensor,
        anchor_positions: Tensor,
        start: Tensor,
        end: Tensor,
        thought_length: int,
        key_start: Tensor | None = None,
        states: ThoughtStates | None = None,
    ):
        self.model, self.lm_head, self.start, self.end = model, lm_head, start, end
        self.thought_length, self.anchor_positions = thought_length, anchor_positions
        self.cache = ThoughtCache(base, anchors, thought_length + 2, key_start, states)

    def sample(self, temperature: float, suppress: tuple[int, int], generator: torch.Generator | None) -> Tensor:
        """Sampled thought tokens, int64 [B, P, k]; temperature 0 is greedy."""
        device = self.anchor_positions.device
        batch, num_anchors = self.anchor_positions.shape
        tokens = torch.empty(batch, num_anchors, self.thought_length, dtype=torch.int64, device=device)
        seeds = torch.randint(2**62, (self.thought_length,), device=device, generator=generator)
        step = self.start.expand(batch, num_anchors, 1, -1)
        for j in range(self.thought_length):
            hidden = self._advance(step)
            tokens[:, :, j] = linear_sample(
                hidden.flatten(0, 2), self.lm_head, temperature=temperature, suppress=suppress, seed=seeds[j]
            ).view(batch, num_anchors)
            step = self.model.embed_tokens(tokens[:, :, j : j + 1])
        return tokens

    def finish(self, tokens: Tensor) -> Tensor:
        """Hidden state [B, P, H] at the end token behind thoughts [B, P, k].

        Runs the steps that are still missing: only the last token and the end token if the thoughts were sampled
        here, all of them if they came from elsewhere.
        """
        batch, num_anchors = self.anchor_positions.shape
        start, end = (x.expand(batch, num_anchors, 1, -1) for x in (self.start, self.end))
        steps = torch.cat([start, self.model.embed_tokens(tokens), end], dim=2)
        return self._advance(steps[:, :, self.cache.steps :])[:, :, -1]

    def _advance(self, embeddings: Tensor) -> Tensor:
        """Hidden states [B, P, S, H] of the next S steps, given their embeddings."""
        steps = embeddings.shape[2]
        offsets = torch.arange(1, steps + 1, device=embeddings.device) + self.cache.steps
        position_ids = (self.anchor_positions[:, :, None] + offsets).flatten(1)
        hidden = run_layers(self.model, embeddings.flatten(1, 2), position_ids, self.cache)
        self.cache.steps += steps
        return hidden.unflatten(1, (-1, steps))
