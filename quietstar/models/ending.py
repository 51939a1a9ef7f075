"""Thoughts of learned length: from the second token on, the end token may be drawn, which ends the thought.

A thought of k tokens ends without drawing the end token. ``quietstar.models.lengths`` describes their representation.
"""

import torch
from torch import Tensor

from quietstar.models.decoder import HiddenStates
from quietstar.models.lengths import behind_ends, lengths_of, slots_of
from quietstar.models.thoughts import Thinker


class EndingThinker(Thinker):
    """A thinker for thoughts of learned length. Thoughts that have ended are dropped from its batch of anchors.

    The end token of a thought runs in the same pass as the next tokens of the others. The rest of the batch is
    renumbered for the sampling noise, so with a given seed a thought depends on how many of those before it in the
    batch have ended. A compiled pass drops nothing.
    """

    _ends: Tensor | None = None  # [B, P, H], the states that ``finish`` returns

    def read(
        self,
        text: Tensor,
        position_ids: Tensor,
        tokens: Tensor | None = None,
        collect: HiddenStates | None = None,
    ) -> Tensor:
        """See ``Thinker``."""
        self.lengths = None if tokens is None else lengths_of(tokens) + 2
        return super().read(text, position_ids, tokens, collect)

    def sample(
        self, temperature: float, suppress: tuple[int, int], generator: torch.Generator | None, finishes: bool = True
    ) -> Tensor:  # fmt: skip
        """Sample thought tokens, int64 [B, P, k], −1 after the end of a thought and for inactive anchors."""
        anchors, k = self.cache.anchors, self.thought_length
        seeds, (start_token, end_token) = self._seeds(generator), suppress
        tokens = torch.full((*anchors.shape, k), -1, device=anchors.device)
        # For the thoughts that are still in the batch, [B, P']: their original places, the tokens drawn last, whether
        # they continue, and whether they have just ended.
        places = torch.arange(anchors.shape[1], device=anchors.device).expand(anchors.shape)
        drawn, running = torch.full_like(places, -1), anchors >= 0
        ending = torch.zeros_like(running)
        for j in range(k + finishes):
            if j > 0:
                places, drawn, running, ending = self._needed(running | ending, places, drawn, running, ending)
                if not places.shape[1]:
                    break
                self._advance(self._step(drawn, ending, last=j == k))
                if finishes:
                    self._keep_ends(places, ending, running if j == k else None)
            elif self.cache.steps == 0:
                self._advance(self.start)
            if j < k:
                drawn = self._draw(running, temperature, suppress if j == 0 else (start_token,), seeds[j])
                ending = (drawn == end_token) & finishes
                running = running & (drawn != end_token)
                tokens[:, :, j] = tokens[:, :, j].scatter(1, places, drawn.masked_fill(~running, -1))
        return tokens

    def finish(self, tokens: Tensor) -> Tensor:
        """See ``Thinker``; ``tokens`` are −1 after the end of a thought."""
        if self._ends is not None:
            return self._ends
        super().finish(tokens)
        run_before = self.cache.steps - self.states.shape[2]
        return behind_ends(self.states, lengths_of(tokens) - run_before)[:, :, 0]

    def _steps(self, tokens: Tensor) -> Tensor:
        return slots_of(tokens, self.start, self.decoder.embed(tokens.clamp_min(0)), self.end)

    def _needed(self, needed: Tensor, *of_thoughts: Tensor) -> list[Tensor]:
        """Drop the thoughts that are not ``needed``, bool [B, P], from the batch and from tensors [B, P]."""
        if torch.compiler.is_compiling():
            return list(of_thoughts)
        most = int(needed.sum(dim=1).max())
        if most == needed.shape[1]:
            return list(of_thoughts)
        chosen = needed.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        self.cache.keep(chosen, needed.gather(1, chosen))
        self.positions = self.positions.gather(1, chosen[..., None].expand(-1, -1, self.positions.shape[2]))
        return [x.gather(1, chosen) for x in of_thoughts]

    def _step(self, drawn: Tensor, ending: Tensor, last: bool) -> Tensor:
        """Embed tokens [B, P] or the end: [B, P, 1, H]; if they are the ``last``, [B, P, 2, H] with the end of all."""
        end = self.end[:, : drawn.shape[1]]
        step = torch.where(ending[..., None, None], end, self.decoder.embed(drawn.clamp_min(0))[:, :, None])
        return torch.cat([step, end], dim=2) if last else step

    def _draw(self, running: Tensor, temperature: float, suppress: tuple[int, ...], seed: Tensor) -> Tensor:
        """Draw the next token of the thoughts that continue, int64 [B, P]; −1 for the others."""
        options = {"temperature": temperature, "suppress": suppress, "seed": seed}
        if torch.compiler.is_compiling():
            drawn = self.head.draw(self.hidden.flatten(0, 1), **options).view(running.shape)
        else:
            drawn = torch.full(running.shape, -1, device=running.device)
            drawn[running] = self.head.draw(self.hidden[running], **options)
        return drawn.clamp_min(0).masked_fill(~running, -1)  # any token for NaN, as in ``Thinker``

    def _keep_ends(self, places: Tensor, ending: Tensor, running: Tensor | None) -> None:
        """Store the states at the end tokens just run: those of ``ending`` and, in the last pass, ``running`` ones."""
        hidden = self.states[:, :, 0]
        if running is not None:
            hidden, ending = torch.where(running[..., None], self.hidden, hidden), ending | running
        if self._ends is None:
            self._ends = hidden.new_zeros(*self.start.shape[:2], hidden.shape[-1])
        index = places[..., None].expand_as(hidden)
        kept = torch.where(ending[..., None], hidden, self._ends.gather(1, index))
        self._ends = self._ends.scatter(1, index, kept)
