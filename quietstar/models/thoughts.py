"""Thinking: running the layers over thought steps, and sampling thoughts behind a finished base pass."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quietstar.models.attention import (
    BaseAndThoughts,
    BaseStates,
    TextCache,
    ThoughtCache,
    ThoughtStates,
    ThoughtTree,
)
from quietstar.models.transformers_names import MistralModel
from quietstar.ops.linear_sample import draw


@dataclass
class HiddenStates:
    """Collects the hidden states [B, L, H] of a text behind the embedding and each layer, the last one normed."""

    length: int
    states: list[Tensor] = field(default_factory=list)

    def take(self, hidden: Tensor) -> Tensor:
        """Keep the first L of ``hidden`` [B, rows, H]; what is handed on is made of it, so that it gets a gradient."""
        text, thoughts = hidden.tensor_split([self.length], dim=1)
        self.states.append(text)
        return torch.cat([text, thoughts], dim=1)


def run_layers(
    model: MistralModel,
    embeddings: Tensor,
    position_ids: Tensor,
    thoughts: TextCache | ThoughtCache | BaseAndThoughts | ThoughtTree,
    collect: HiddenStates | None = None,
) -> Tensor:
    """Final hidden states [B, rows, H] of rows whose attention ``thoughts`` lays out.

    Transformers' own forward would build a causal mask over all rows; here the layout is the mask.
    """
    hidden = embeddings
    position_embeddings = model.rotary_emb(hidden, position_ids)
    for layer in model.layers:
        if collect is not None:
            hidden = collect.take(hidden)
        hidden = layer(hidden, position_ids=position_ids, position_embeddings=position_embeddings, thoughts=thoughts)
    hidden = model.norm(hidden)
    return hidden if collect is None else collect.take(hidden)


class Thinker:
    """Thinks behind anchors of a base pass: samples thoughts and gives the hidden state at their end.

    The base pass is either finished, or is run by :meth:`read` together with the first steps of the thoughts.

    Args:
        model: the decoder.
        lm_head: [V, H].
        base: the kept states of the base pass.
        anchors: int [B, P], indices into the base keys, −1 inactive.
        anchor_positions: int [B, P], position ids of the anchors.
        start, end: embeddings [H] of the thought tokens.
        thought_length: k.
        key_start: int [B] or [B, P], first base key that each anchor's text begins with; None where it is 0.
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
        self.model, self.lm_head = model, lm_head
        self.thought_length, max_steps = thought_length, thought_length + 2
        self.start, self.end = (x.expand(*anchors.shape, 1, -1) for x in (start, end))
        self.cache = ThoughtCache(base, anchors, max_steps, key_start, states)
        steps = torch.arange(1, max_steps + 1, device=anchors.device)
        self.positions = anchor_positions[:, :, None] + steps  # [B, P, T]
        self.hidden: Tensor | None = None  # [B, P, H], behind the last step so far

    def read(
        self,
        text: Tensor,
        position_ids: Tensor,
        tokens: Tensor | None = None,
        collect: HiddenStates | None = None,
    ) -> Tensor:
        """Run the base pass, and in it the steps of the thoughts that are known: the start tokens at least.

        Args:
            text: embeddings [B, L, H].
            position_ids: int [B, L].
            tokens: the thoughts [B, P, k], if they are not to be sampled.
            collect: takes the hidden states of the text.

        Returns:
            Hidden states [B, L, H] behind the text.
        """
        return self._advance(self.start if tokens is None else self._steps(tokens), text, position_ids, collect)

    def sample(self, temperature: float, suppress: tuple[int, int], generator: torch.Generator | None) -> Tensor:
        """Sampled thought tokens, int64 [B, P, k]; temperature 0 is greedy."""
        anchors, device = self.cache.anchors.shape, self.cache.anchors.device
        seeds = torch.randint(2**62, (self.thought_length,), device=device, generator=generator)
        tokens: list[Tensor] = []
        for j in range(self.thought_length):
            if self.cache.steps == j:
                self._advance(self.start if j == 0 else self.model.embed_tokens(tokens[-1]))
            drawn = draw(
                self.hidden.flatten(0, 1), self.lm_head, temperature=temperature, suppress=suppress, seed=seeds[j]
            )
            # Where there is none (-1) the state is NaN, and so are loss and logits, which say so: any token will do.
            tokens.append(drawn.view(*anchors, 1).clamp_min(0))
        return torch.cat(tokens, dim=2) if tokens else seeds.new_empty(*anchors, 0)

    def finish(self, tokens: Tensor) -> Tensor:
        """Hidden state [B, P, H] at the end token behind thoughts [B, P, k].

        Runs the steps that are still missing: only the last token and the end token if the thoughts were sampled
        here, none if ``read`` was given them.
        """
        if self.cache.steps < self.cache.max_steps:
            self._advance(self._steps(tokens)[:, :, self.cache.steps :])
        return self.hidden

    def _steps(self, tokens: Tensor) -> Tensor:
        """Embeddings [B, P, k + 2, H] of whole thoughts."""
        return torch.cat([self.start, self.model.embed_tokens(tokens), self.end], dim=2)

    def _advance(
        self,
        steps: Tensor,
        text: Tensor | None = None,
        position_ids: Tensor | None = None,
        collect: HiddenStates | None = None,
    ) -> Tensor:
        """Run the next steps [B, P, S, H], in one pass with base ``text`` if there is one.

        Returns:
            Hidden states [B, L, H] behind the text, L = 0 without.
        """
        count = steps.shape[2]
        positions = self.positions[:, :, self.cache.steps : self.cache.steps + count].flatten(1)
        rows, length, layout = steps.flatten(1, 2), 0, self.cache
        if text is not None:
            length = text.shape[1]
            rows, positions = torch.cat([text, rows], dim=1), torch.cat([position_ids, positions], dim=1)
            layout = self._layout(length, whole=count == self.cache.max_steps)
        hidden = run_layers(self.model, rows, positions, layout, collect)
        self.cache.steps += count
        self.hidden = hidden[:, length:].unflatten(1, (-1, count))[:, :, -1]
        return hidden[:, :length]

    def _layout(self, length: int, whole: bool) -> BaseAndThoughts | ThoughtTree:
        """Of a pass over a text and the first steps of its thoughts; if these are ``whole``, nothing need be kept."""
        base = self.cache.base
        if whole and isinstance(base, BaseStates) and base.cache is None:
            return ThoughtTree(length, self.cache.anchors, base.mask, self.cache.key_start)
        return BaseAndThoughts(base, length, self.cache)
