"""How tokens are drawn, as it is handed from the public function down to the kernels."""

from typing import NamedTuple

from torch import Tensor


class Sampling(NamedTuple):
    """Arguments of ``linear_sample``, checked; ``top_k`` and ``top_p`` are None where they leave no token out."""

    seed: Tensor  # int64 scalar on the device of the logits
    temperature: float
    softcap: float | None
    suppress: Tensor | None  # int64 token ids
    top_k: int | None
    top_p: float | None

    @property
    def filtered(self) -> bool:
        """Whether only the likeliest tokens are drawn."""
        return self.top_k is not None or self.top_p is not None
