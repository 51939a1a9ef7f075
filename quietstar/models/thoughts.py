"""Thinking: runs the decoder on thought steps and samples thoughts after a base pass."""

import torch
from torch import Tensor

from quietstar.models.decoder import Decoder, HiddenStates
from quietstar.models.head import Head
from quietstar.models.layouts import BaseAndThoughts, BaseStates, TextCache, ThoughtCache, ThoughtStates, ThoughtTree


class Thinker:
    """Thinks after anchors of a base pass: samples thoughts and computes the hidden state at their end.

    The base pass is either finished, or ``read`` runs it together with the first steps of the thoughts.

    Args:
        decoder: runs the steps.
        head: gives the predictions that thought tokens are drawn from.
        base: keys and values of the base pass.
        anchors: int [B, P], columns of the text; −1 is inactive.
        anchor_positions: int [B, P], position ids of the anchors.
        start, end: embeddings [H] of the thought tokens.
        thought_length: k.
        key_start: int [B] or [B, P], first column of each anchor's text; None if it is 0 for all.
        states: memory for the thoughts' keys and values, to be reused. Default: new.
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
        self.states: Tensor | None = None  # [B, P, S, H], hidden states of the last pass's steps
        self.lengths: Tensor | None = None  # int [B, P], steps of each thought if they are known to differ

    @property
    def hidden(self) -> Tensor:
        """The hidden states [B, P, H] of the last step so far."""
        return self.states[:, :, -1]

    def read(
        self,
        text: Tensor,
        position_ids: Tensor,
        tokens: Tensor | None = None,
        collect: HiddenStates | None = None,
    ) -> Tensor:
        """Run the base pass together with those thought steps that are already known, at least the start tokens.

        Args:
            text: embeddings [B, L, H].
            position_ids: int [B, L].
            tokens: given thoughts [B, P, k], if they are not to be sampled.
            collect: collects the hidden states of the text.

        Returns:
            Hidden states [B, L, H] of the text.
        """
        return self._advance(self.start if tokens is None else self._steps(tokens), text, position_ids, collect)

    def sample(
        self, temperature: float, suppress: tuple[int, int], generator: torch.Generator | None, finishes: bool = True
    ) -> Tensor:  # fmt: skip
        """Sample thought tokens, int64 [B, P, k].

        Args:
            temperature: sampling temperature; 0 is greedy.
            suppress: ids of the start and the end token.
            generator: source of the seeds.
            finishes: whether ``finish`` will be called afterwards.
        """
        anchors, seeds = self.cache.anchors.shape, self._seeds(generator)
        tokens: list[Tensor] = []
        for j in range(self.thought_length):
            if self.cache.steps == j:
                self._advance(self.start if j == 0 else self.decoder.embed(tokens[-1]))
            drawn = self.head.draw(
                self.hidden.flatten(0, 1), temperature=temperature, suppress=suppress, seed=seeds[j]
            )  # fmt: skip
            # No token (-1) means that the state is NaN. Loss and logits will be NaN too, so any token will do.
            tokens.append(drawn.view(*anchors, 1).clamp_min(0))
        return torch.cat(tokens, dim=2) if tokens else seeds.new_empty(*anchors, 0)

    def finish(self, tokens: Tensor) -> Tensor:
        """Compute the hidden states [B, P, H] at the end tokens of thoughts [B, P, k].

        Runs the steps that are still missing: only the last token and the end token if the thoughts were sampled here,
        none if they were passed to ``read``.
        """
        if self.cache.steps < self.cache.max_steps:
            self._advance(self._steps(tokens)[:, :, self.cache.steps :])
        return self.hidden

    def _seeds(self, generator: torch.Generator | None) -> Tensor:
        """Draw a seed for the noise of each token, int64 [k]."""
        # generator=None is not passed: with it, torch.compile supports no randint of symbolic length.
        options = {} if generator is None else {"generator": generator}
        return torch.randint(2**62, (self.thought_length,), device=self.cache.anchors.device, **options)

    def _steps(self, tokens: Tensor) -> Tensor:
        """Embed whole thoughts, [B, P, k + 2, H]."""
        return torch.cat([self.start, self.decoder.embed(tokens), self.end], dim=2)

    def _advance(
        self,
        steps: Tensor,
        text: Tensor | None = None,
        position_ids: Tensor | None = None,
        collect: HiddenStates | None = None,
    ) -> Tensor:
        """Run the next steps [B, P, S, H], in one pass with the base ``text`` if given.

        Returns:
            Hidden states [B, L, H] of the text; L = 0 without text.
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
        """Return the layout of a pass over a text and the first steps of its thoughts; ``whole`` ones need no cache."""
        base = self.cache.base
        if whole and isinstance(base, BaseStates) and base.cache is None:
            return ThoughtTree(base.rows, self.cache.anchors, self.cache.key_start, self.lengths)
        return BaseAndThoughts(base, length, self.cache)
