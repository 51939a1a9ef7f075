"""The measurements for a report: every token of a text, after the model's own thoughts and after controls."""

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

ROWS = 2**15  # largest number of rows of text and thoughts in a forward pass, unless a single window has more
SHORTEST = 3  # tokens of the shortest window: the model needs two after the first


class Reading(NamedTuple):
    """A text in ``windows`` of L tokens and its measurements, with one thought after every token."""

    windows: Tensor  # int64 [windows, L]
    counted: Tensor  # bool [windows, L−1], the predictions that count: every token of the text once
    own: HeldOutNll
    shuffled: HeldOutNll
    random: HeldOutNll
    lengths: dict[int, HeldOutNll]  # after own thoughts, by thought length
    likeliest: Likeliest

    @property
    def gains(self) -> Tensor:
        """The gains of the thoughts in nats, [windows, L−1]."""
        return self.own.base - self.own.mixed


def cut(tokens: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    """Cut a text into windows of at most ``width`` tokens, and mark the predictions that count, as in ``Reading``.

    A window begins with the last token of the previous one, so that every token except the first is predicted. The last
    window begins earlier, so that it is as long as the others.
    """
    count, length = len(tokens), min(width, len(tokens))
    starts = range(0, count - 1, length - 1)
    begins = torch.tensor([min(start, count - length) for start in starts])
    positions = begins[:, None] + torch.arange(length)
    windows = torch.tensor(tokens)[positions]
    counted = positions[:, 1:] > torch.tensor(starts)[:, None]
    missing = max(0, SHORTEST - length)  # padded on the right, which nothing sees
    pad = torch.nn.functional.pad
    return pad(windows, (0, missing)), pad(counted, (0, missing))


def batch_size(length: int, thought_length: int) -> int:
    """Return the number of windows per forward pass."""
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
        model: the model, with ``config.num_thoughts`` 1, on the device of the windows.
        windows, counted: as in ``Reading``. By default all predictions count.
        seed: seed of the thoughts and their controls.
        thought_lengths: thought lengths to measure in addition to the model's.
        progress: wraps the batches of a measurement, with a title.
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
