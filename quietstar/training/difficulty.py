"""The gain of thoughts on the hardest and the easiest tenth of held-out tokens, as rated before training."""

from hashlib import sha256
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quietstar.models.documents import IGNORE_INDEX

FILE_NAME = "difficulty.safetensors"  # in checkpoints

_HARD, _EASY = 1, -1


class GainByDifficulty:
    """Mean gains over tokens that are chosen once for every text and then kept.

    The difficulty of a token is its nll without a thought when the text is first rated, which should be before
    training. Choosing the tokens on which the present base prediction is worst would be a biased selection, which makes
    thoughts look better than they are.
    """

    def __init__(self) -> None:
        self._tenths: dict[str, Tensor] = {}  # by text: int8 for each of its tokens
        self._added: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, base_nll: Tensor, gain: Tensor, labels: Tensor) -> None:
        """Add a part of a text. All are [B, L−1], for token i+1; ``labels`` are −100 where it does not count."""
        self._added.append((base_nll.detach().flatten(), gain.detach().flatten(), labels.flatten()))

    def rate(self) -> None:
        """Choose the tenths of the added text, unless it is already rated, and reset. Waits for the device."""
        if self._added:
            self._take()

    def means(self) -> dict[str, float]:
        """Return the mean ``gain_hard`` and ``gain_easy`` of the added text, in nats, and reset. Waits for the device.

        A text that was not rated before is rated now. A text without tokens gives no values.
        """
        if not self._added:
            return {}
        gain, tenths = self._take()
        groups = {"gain_hard": gain[tenths == _HARD], "gain_easy": gain[tenths == _EASY]}
        return {name: float(values.mean()) for name, values in groups.items() if len(values)}

    def save(self, folder: str | PathLike) -> None:
        """Write the ratings of texts into a checkpoint."""
        if self._tenths:
            save_file(self._tenths, Path(folder) / FILE_NAME)

    def load(self, folder: str | PathLike) -> None:
        """Load the ratings that ``save`` wrote, if there are any."""
        file = Path(folder) / FILE_NAME
        if file.is_file():
            self._tenths |= load_file(file)

    def _take(self) -> tuple[Tensor, Tensor]:
        """Return, and reset, the gains of the added tokens that count, and the tenths that they belong to."""
        base_nll, gain, labels = (torch.cat(column).cpu() for column in zip(*self._added, strict=True))
        self._added = []
        counted = labels != IGNORE_INDEX
        base_nll, gain, labels = base_nll[counted], gain[counted], labels[counted]
        key = sha256(labels.numpy().tobytes()).hexdigest()
        if key not in self._tenths:
            self._tenths[key] = _tenths(base_nll)
        return gain, self._tenths[key]


def _tenths(nll: Tensor) -> Tensor:
    """Mark the hardest and the easiest tenth in int8 like ``nll`` [tokens]: at least one token each, given two."""
    order = nll.argsort(stable=True)
    count = min(max(1, round(len(nll) / 10)), len(nll) // 2)
    tenths = torch.zeros_like(nll, dtype=torch.int8)
    tenths[order[:count]] = _EASY
    tenths[order[len(nll) - count :]] = _HARD
    return tenths
