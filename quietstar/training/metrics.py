"""Metrics of training and evaluation: means over steps, accumulated on the device, and the time spent."""

import math
import time

import torch
from torch import Tensor

from quietstar.models import QuietStarOutput
from quietstar.models.anchors import predicted_from
from quietstar.models.documents import IGNORE_INDEX, text_labels, token_starts


class ThoughtMetrics:
    """Means of the model's outputs over all labelled tokens since the last ``totals``.

    Adding does not wait for the device: sums and counts stay there until they are read.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._totals: Tensor | None = None

    def add(
        self,
        output: QuietStarOutput,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        """Add the output of one forward pass; the other arguments are those passed to it, [B, L]."""
        _, num_thoughts, _, lookahead = output.talk_nll.shape
        k = output.thought_tokens.shape[-1]
        starts = token_starts(attention_mask, position_ids, labels.shape)
        labels = text_labels(labels, attention_mask, starts)
        labelled = labels[:, 1:] != IGNORE_INDEX
        ahead = predicted_from(labels, lookahead, starts, output.anchors)
        predicted = ahead.target != IGNORE_INDEX  # [B, A, M]
        gains = predicted[:, : ahead.count].any(dim=-1)
        if ahead.rewarded is not None:
            gains &= ahead.rewarded
        rewarded_count, predicted_count = gains.sum() * num_thoughts, predicted.sum(dim=(0, 1)) * num_thoughts
        talk = zip(output.talk_nll.sum(dim=(0, 1, 2)), predicted_count, strict=True)
        entries = {
            "base_nll": (output.base_nll.sum(), labelled.sum()),
            **{f"talk_nll_{m}": entry for m, entry in enumerate(talk)},
            "reward": (output.reward.sum(), rewarded_count),
            "advantage_mean": (output.advantage.sum(), rewarded_count),
            "advantage_std": (output.advantage.square().sum(), rewarded_count),
            "mixing_weight": ((output.mixing_weight * predicted[:, None]).sum(), predicted_count.sum()),
            "policy_loss": (output.policy_loss, labelled.new_ones(())),
        }
        if output.gain_loss is not None:
            count = predicted[..., 0].sum()
            entries["gain_loss"] = torch.where(count > 0, output.gain_loss * count, 0), count
        if k > 0:
            thinks = predicted.any(dim=-1)[:, None].expand(-1, num_thoughts, -1)
            count = thinks.sum()
            entries["distinct_thoughts"] = _distinct(output.thought_tokens[:, :, : predicted.shape[1]], thinks), count
            if output.thought_lengths is not None:
                lengths = output.thought_lengths[:, :, : predicted.shape[1]]
                entries["thought_length"] = (lengths * thinks).sum(), count
            entropy = output.thought_entropy
            if entropy is not None:
                entries["thought_entropy"] = torch.where(count > 0, entropy * count, 0), count
        self._add(entries)

    def add_plain(
        self, nll: Tensor, teacher_nll: Tensor, labels: Tensor, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add the nll [B, L−1] of a pass without thoughts, and that of a thinking teacher on the same texts."""
        starts = token_starts(attention_mask, position_ids, labels.shape)
        count = (text_labels(labels, attention_mask, starts)[:, 1:] != IGNORE_INDEX).sum()
        self._add({"base_nll": (nll.sum(), count), "teacher_nll": (teacher_nll.sum(), count)})

    def _add(self, entries: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add sums and counts. Entries may differ between passes: a stage may look further ahead than the next."""
        totals = torch.stack([torch.stack(row).float() for row in zip(*entries.values(), strict=True)]).detach()
        names = list(entries)
        if self._totals is None:
            self._names, self._totals = names, totals
            return
        if names != self._names:
            known = self._names
            self._names = known + [name for name in names if name not in known]
            place = torch.tensor([self._names.index(name) for name in names], device=totals.device)
            new = totals.new_zeros(2, len(self._names))
            totals = new.index_copy(1, place, totals)
            self._totals = torch.nn.functional.pad(self._totals, (0, len(self._names) - len(known)))
        self._totals = self._totals + totals

    def any(self) -> bool:
        """Whether a pass was added since the last call of ``totals``."""
        return self._totals is not None

    def totals(self) -> Tensor:
        """Return sums and counts since the last call, float32 [2, entries] on the device, and reset them."""
        totals, self._totals = self._totals, None
        return totals

    def means(self, totals: Tensor) -> tuple[dict[str, float], int]:
        """Return the means of ``totals`` by name, and the number of labelled tokens. Waits for the device.

        Returns:
            base_nll, talk_nll_0 … talk_nll_{M−1}, reward and mixing_weight, each per token (likelihoods in nats);
            policy_loss per forward pass (before its weight); mean and standard deviation of all advantages; with a gain
            head, gain_loss, its squared error in nats² per position that thinks; thought_entropy per thought token and
            distinct_thoughts, the share of a forward pass's thoughts that differ (neither if thoughts have no tokens);
            thought_length if thoughts have learned lengths.
        """
        sums, counts = totals.tolist()
        means = {name: total / max(count, 1) for name, total, count in zip(self._names, sums, counts, strict=True)}
        if "advantage_std" in means:
            means["advantage_std"] = math.sqrt(max(0.0, means["advantage_std"] - means["advantage_mean"] ** 2))
        return means, int(counts[0])


def _distinct(thoughts: Tensor, counted: Tensor) -> Tensor:
    """Count the distinct thoughts, int64 [..., k], among those ``counted``, bool [...]: a scalar on the device.

    Sorting by tokens makes equal thoughts neighbours. (torch.unique would make the host wait for the number.)
    """
    rows = thoughts.masked_fill(~counted[..., None], -1).flatten(0, -2)
    for column in reversed(range(rows.shape[1])):
        rows = rows[rows[:, column].argsort(stable=True)]
    return (rows[1:] != rows[:-1]).any(dim=1).sum() + (rows[0, 0] >= 0)


class Stopwatch:
    """Measures seconds of work without pauses."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Start, or continue after a pause."""
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
