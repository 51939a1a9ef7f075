"""What thoughts gain on the hardest and on the easiest tenth of held-out tokens, as they were before training."""

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
    """Means over tokens that are chosen once for every text and then kept.

    A token is as hard as its nll without a thought is high when the text is first rated. That should be before
    training: whoever chooses the tokens on which the base prediction does worst now, finds it worse there than it is,
    and thoughts better.
    """

    def __init__(self) -> None:
        self._tenths: dict[str, Tensor] = {}  # of each text, int8 of its tokens
        self._added: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, base_nll: Tensor, gain: Tensor, labels: Tensor) -> None:
        """Add a part of a text, all like ``labels`` [B, L−1]: of token i+1, −100 where it does not count."""
        self._added.append((base_nll.detach().flatten(), gain.detach().flatten(), labels.flatten()))

    def rate(self) -> None:
        """Choose the tenths of the text that was added, if it is not known, and forget it. Waits for the device."""
        if self._added:
            self._take()

    def means(self) -> dict[str, float]:
        """Mean ``gain_hard`` and ``gain_easy`` of the text that was added, in nats; forgets it. Waits for the device.

        A text that was not rated before is rated now. Nothing is said of a text without tokens.
        """
        if not self._added:
            return {}
        gain, tenths = self._take()
        groups = {"gain_hard": gain[tenths == _HARD], "gain_easy": gain[tenths == _EASY]}
        return {name: float(values.mean()) for name, values in groups.items() if len(values)}

    def save(self, folder: str | PathLike) -> None:
        """Write what is known of texts into a checkpoint."""
        if self._tenths:
            save_file(self._tenths, Path(folder) / FILE_NAME)

    def load(self, folder: str | PathLike) -> None:
        """Take over what ``save`` wrote, if it did."""
        file = Path(folder) / FILE_NAME
        if file.is_file():
            self._tenths |= load_file(file)

    def _take(self) -> tuple[Tensor, Tensor]:
        """Gains and tenths of the tokens that count in what was added."""
        base_nll, gain, labels = (torch.cat(column).cpu() for column in zip(*self._added, strict=True))
        self._added = []
        counted = labels != IGNORE_INDEX
        base_nll, gain, labels = base_nll[counted], gain[counted], labels[counted]
        key = sha256(labels.numpy().tobytes()).hexdigest()
        if key not in self._tenths:
            self._tenths[key] = _tenths(base_nll)
        return gain, self._tenths[key]


def _tenths(nll: Tensor) -> Tensor:
    """The hardest and the easiest tenth, rounded, at least one token each; int8 like ``nll`` [tokens]."""
    order = nll.argsort(stable=True)
    count = min(max(1, round(len(nll) / 10)), len(nll) // 2)
    tenths = torch.zeros_like(nll, dtype=torch.int8)
    tenths[order[:count]] = _EASY
    tenths[order[len(nll) - count :]] = _HARD
    return tenths
