"""The head, which turns hidden states into logits as the decoder's family does, with its divisor and soft cap."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from quietstar.models.weights import weight_of
from quietstar.ops import linear_cross_entropy, mixed_linear_cross_entropy
from quietstar.ops._dtensor import gathered, is_dtensor
from quietstar.ops._precision import autocast_inputs
from quietstar.ops.linear_sample import draw


class Head(NamedTuple):
    """logits = cap(weight · hidden / divisor), cap(x) = softcap · tanh(x / softcap).

    Its methods call the ops of the same names. A new head is created from the model's parameters for every pass.
    """

    weight: Tensor  # [V, H]; under autocast cast once for all ops of the pass
    divisor: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, lm_head: nn.Module, config: PreTrainedConfig, dtype: torch.dtype) -> "Head":
        """Create the head of a decoder from its output layer and configuration.

        A matrix that FSDP has sharded as a unit of its own is gathered here, in the precision of the pass, because that
        unit is never called.

        Args:
            lm_head: linear layer without a bias.
            config: the decoder's configuration.
            dtype: dtype of hidden states.

        Raises:
            ValueError: ``lm_head`` does more than multiply by a matrix.
        """
        weight = weight_of("lm_head", lm_head)
        if is_dtensor(weight):
            weight = gathered("lm_head", weight.to(dtype))
        weight = autocast_inputs(weight)[0]
        divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
        return cls(weight, divisor, getattr(config, "final_logit_softcapping", None))  # Gemma 2 and 3

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits [..., V] of hidden states [..., H]."""
        return self.shaped(F.linear(hidden, self.weight))

    def shaped(self, logits: Tensor) -> Tensor:
        """Apply divisor and cap to the product with the matrix."""
        logits = logits if self.divisor == 1 else logits / self.divisor
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def cross_entropy(self, hidden: Tensor, target: Tensor, *, temperature: float = 1.0, **options):
        return linear_cross_entropy(hidden, self.weight, target, **self._scaled(temperature), **options)

    def mixed_cross_entropy(self, base: Tensor, thought: Tensor, mixing_weight: Tensor, target: Tensor, **options):
        return mixed_linear_cross_entropy(
            base, thought, mixing_weight, self.weight, target, **self._scaled(1.0), **options
        )  # fmt: skip

    @torch.no_grad()
    def entropy(self, hidden: Tensor) -> Tensor:
        """Compute the entropy [rows], in nats, of the predictions from hidden states [rows, H]."""
        target = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        return self.cross_entropy(hidden, target, reduction="none", return_entropy=True)[1]

    def draw(self, hidden: Tensor, *, temperature: float, suppress: tuple[int, ...], seed: Tensor) -> Tensor:
        """Draw tokens int64 [rows] as ``linear_sample`` does; −1 where none can be drawn."""
        return draw(hidden, self.weight, suppress=suppress, seed=seed, **self._scaled(temperature))

    def _scaled(self, temperature: float) -> dict[str, float | None]:
        """Convert divisor, temperature and cap to the arguments of ops, which cap before they divide."""
        cap = None if self.softcap is None else self.softcap * self.divisor
        return {"temperature": temperature * self.divisor, "softcap": cap}
