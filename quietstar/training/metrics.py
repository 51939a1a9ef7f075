"""What training and evaluation report: means over steps, summed up on the device, and the time spent."""

import time

import torch
from torch import Tensor

from quietstar.models import QuietStarOutput
from quietstar.models.documents import IGNORE_INDEX, look_ahead, rewarded, text_labels, token_starts


class ThoughtMetrics:
    """Means of what the model reports, over all tokens with a label since the last :meth:`totals`.

    Nothing waits for the device: sums and counts stay there until they are asked for.
    """

    def __init__(self) -> None:
        self._totals: Tensor | None = None

    def add(
        self,
        output: QuietStarOutput,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        """Add one forward pass; the other arguments are those that it was given, [B, L]."""
        _, num_thoughts, _, lookahead = output.talk_nll.shape
        starts = token_starts(attention_mask, position_ids, labels.shape)
        labels = text_labels(labels, attention_mask, starts)
        labelled = labels[:, 1:] != IGNORE_INDEX
        predicted = look_ahead(labels, lookahead, starts) != IGNORE_INDEX  # [B, L−1, M]
        gains = predicted[:, : output.reward.shape[2]].any(dim=-1)
        if (within := rewarded(labels, lookahead, starts)) is not None:
            gains &= within
        sums = [
            output.base_nll.sum(),
            *output.talk_nll.sum(dim=(0, 1, 2)),
            output.reward.sum(),
            (output.mixing_weight * predicted[:, None]).sum(),
            output.policy_loss,
        ]
        counts = [
            labelled.sum(),
            *predicted.sum(dim=(0, 1)) * num_thoughts,
            gains.sum() * num_thoughts,
            predicted.sum() * num_thoughts,
            labelled.new_ones(()),
        ]
        totals = torch.stack([torch.stack(row).float() for row in (sums, counts)]).detach()
        self._totals = totals if self._totals is None else self._totals + totals

    def totals(self) -> Tensor:
        """Sums and counts since the last call, float32 [2, 4 + M] on the device; starts again from nothing."""
        totals, self._totals = self._totals, None
        return totals

    @staticmethod
    def means(totals: Tensor) -> tuple[dict[str, float], int]:
        """Names and means of ``totals``, and the number of labelled tokens. Waits for the device.

        Returns:
            base_nll, talk_nll_0 … talk_nll_{M−1}, reward and mixing_weight, each per token, in nats where it is a
            likelihood; policy_loss per forward pass (before its weight).
        """
        lookahead = totals.shape[1] - 4
        names = ["base_nll", *(f"talk_nll_{m}" for m in range(lookahead)), "reward", "mixing_weight", "policy_loss"]
        sums, counts = totals.tolist()
        means = {name: total / max(count, 1) for name, total, count in zip(names, sums, counts, strict=True)}
        return means, int(counts[0])


class Stopwatch:
    """Seconds of work, without the pauses."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Go on, if paused."""
        if self._started is None:
            self._started = time.perf_counter()

    def pause(self) -> None:
        """Stop until the next start."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def lap(self) -> float:
        """Pause and return the seconds since the last lap."""
        self.pause()
        seconds, self._seconds = self._seconds, 0.0
        return seconds
