"""What is measured for a report: every token of a text, after the model's own thoughts and after controls."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quietstar.evaluation import (
    HeldOutNll,
    Likeliest,
    held_out_nll,
    likeliest_tokens,
    shuffle_thoughts,
)
from quietstar.models import QuietStarForCausalLM
from quietstar.models.controls import random_like

ROWS = 2**15  # of text and thoughts in a forward pass, at most, where a window has not more
SHORTEST = 3  # tokens of a window: the model wants two behind the first


class Reading(NamedTuple):
    """A text in ``windows`` of L tokens and what was measured there, one thought behind every token."""

    windows: Tensor  # int64 [windows, L]
    counted: Tensor  # bool [windows, L−1], the predictions that count: every token of the text once
    own: HeldOutNll
    shuffled: HeldOutNll
    random: HeldOutNll
    lengths: dict[int, HeldOutNll]  # after own thoughts of other lengths
    likeliest: Likeliest

    @property
    def gains(self) -> Tensor:
        """What the thoughts gained, in nats, [windows, L−1]."""
        return self.own.base - self.own.mixed


def cut(tokens: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    """Windows of at most ``width`` tokens and the predictions in them that count, as in ``Reading``.

    A window begins with the last token of the one before, so that every token but the first is predicted; the last
    window begins earlier, to be as long as the others.
    """
    count, length = len(tokens), min(width, len(tokens))
    starts = range(0, count - 1, length - 1)
    begins = torch.tensor([min(start, count - length) for start in starts])
    positions = begins[:, None] + torch.arange(length)
    windows = torch.tensor(tokens)[positions]
    counted = positions[:, 1:] > torch.tensor(starts)[:, None]
    missing = max(0, SHORTEST - length)  # nothing sees what is behind it
    pad = torch.nn.functional.pad
    return pad(windows, (0, missing)), pad(counted, (0, missing))


def batch_size(length: int, thought_length: int) -> int:
    """Windows per forward pass."""
    return max(1, ROWS // (length * (thought_length + 3)))


def read(
    model: QuietStarForCausalLM,
    windows: Tensor,
    counted: Tensor | None = None,
    *,
    seed: int,
    thought_lengths: Iterable[int] = (),
    progress: Callable[[Iterable, str], Iterable] = lambda batches, title: batches,
) -> Reading:
    """Measure a text.

    Args:
        model: with ``config.num_thoughts`` 1, on the device of the windows.
        windows, counted: as in ``Reading``; all predictions count by default.
        seed: of the thoughts and of their controls.
        thought_lengths: to measure besides that of the model.
        progress: wraps the batches of a measurement with a title.
    """
    counted = torch.ones_like(windows[:, 1:], dtype=torch.bool) if counted is None else counted
    vocabulary = model.config.vocab_size

    def measure(title: str, thoughts: str | Tensor = "own", length: int | None = None) -> HeldOutNll:
        size = batch_size(windows.shape[1], model.config.thought_length if length is None else length)
        return held_out_nll(
            model, windows, thoughts=thoughts, thought_length=length, batch_size=size, seed=seed,
            progress=lambda batches: progress(batches, title),
        )  # fmt: skip

    own = measure("own thoughts")
    thoughts = own.thought_tokens
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        shuffled, drawn = shuffle_thoughts(thoughts), random_like(thoughts, model.config)
    return Reading(
        windows,
        counted,
        own,
        measure("shuffled thoughts", shuffled),
        measure("random thoughts", drawn),
        {length: measure(f"thought length {length}", length=length) for length in thought_lengths},
        likeliest_tokens(
            model, windows, thoughts, count=min(3, vocabulary),
            batch_size=batch_size(windows.shape[1], model.config.thought_length),
        ),
    )  # fmt: skip
