"""Thinking: running the decoder over thought steps, and sampling thoughts behind a finished base pass."""

import torch
from torch import Tensor

from quietstar.models.decoder import Decoder, HiddenStates
from quietstar.models.head import Head
from quietstar.models.layouts import BaseAndThoughts, BaseStates, TextCache, ThoughtCache, ThoughtStates, ThoughtTree


class Thinker:
    """Thinks behind anchors of a base pass: samples thoughts and gives the hidden state at their end.

    The base pass is either finished, or is run by ``read`` together with the first steps of the thoughts.

    Args:
        decoder: it runs the steps.
        head: thoughts are drawn from its predictions.
        base: the kept states of the base pass.
        anchors: int [B, P], columns of the text, −1 inactive.
        anchor_positions: int [B, P], position ids of the anchors.
        start, end: embeddings [H] of the thought tokens.
        thought_length: k.
        key_start: int [B] or [B, P], first column of each anchor's text; None where it is 0.
        states: room for the thoughts' keys and values, to be reused; default new.
    """

    def __init__(
        self,
        decoder: Decoder,
        head: Head,
        base: BaseStates | TextCache,
        anchors: Tensor,
        anchor_positions: Tensor,
        start: Tensor,
        end: Tensor,
        thought_length: int,
        key_start: Tensor | None = None,
        states: ThoughtStates | None = None,
    ):
        self.decoder, self.head = decoder, head
        self.thought_length, max_steps = thought_length, thought_length + 2
        self.start, self.end = (x.expand(*anchors.shape, 1, -1) for x in (start, end))
        self.cache = ThoughtCache(base, anchors, max_steps, key_start, states)
        steps = torch.arange(1, max_steps + 1, device=anchors.device)
        self.positions = anchor_positions[:, :, None] + steps  # [B, P, T]
        self.states: Tensor | None = None  # [B, P, S, H], behind the steps of the last pass
        self.lengths: Tensor | None = None  # int [B, P], steps of each thought where they are known to differ

    @property
    def hidden(self) -> Tensor:
        """[B, P, H], behind the last step so far."""
        return self.states[:, :, -1]

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

    def sample(
        self, temperature: float, suppress: tuple[int, int], generator: torch.Generator | None, finishes: bool = True
    ) -> Tensor:  # fmt: skip
        """Sampled thought tokens, int64 [B, P, k].

        Args:
            temperature: 0 is greedy.
            suppress: the start and the end token.
            generator: of the seeds.
            finishes: whether ``finish`` will be called.
        """
        anchors, seeds = self.cache.anchors.shape, self._seeds(generator)
        tokens: list[Tensor] = []
        for j in range(self.thought_length):
            if self.cache.steps == j:
                self._advance(self.start if j == 0 else self.decoder.embed(tokens[-1]))
            drawn = self.head.draw(
                self.hidden.flatten(0, 1), temperature=temperature, suppress=suppress, seed=seeds[j]
            )  # fmt: skip
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

    def _seeds(self, generator: torch.Generator | None) -> Tensor:
        """Of the noise of each token, int64 [k]."""
        # generator=None is left out: with it, torch.compile has no randint of a symbolic length.
        options = {} if generator is None else {"generator": generator}
        return torch.randint(2**62, (self.thought_length,), device=self.cache.anchors.device, **options)

    def _steps(self, tokens: Tensor) -> Tensor:
        """Embeddings [B, P, k + 2, H] of whole thoughts."""
        return torch.cat([self.start, self.decoder.embed(tokens), self.end], dim=2)

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
        hidden = self.decoder(rows, positions, layout, collect)
        self.cache.steps += count
        self.states = hidden[:, length:].unflatten(1, (-1, count))
        return hidden[:, :length]

    def _layout(self, length: int, whole: bool) -> BaseAndThoughts | ThoughtTree:
        """Of a pass over a text and the first steps of its thoughts; if these are ``whole``, nothing need be kept."""
        base = self.cache.base
        if whole and isinstance(base, BaseStates) and base.cache is None:
            return ThoughtTree(base.rows, self.cache.anchors, self.cache.key_start, self.lengths)
        return BaseAndThoughts(base, length, self.cache)
