"""The specification: dense logits, PyTorch's cross-entropy, gradients by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quietstar.ops._precision import widen
from quietstar.ops._vocabulary import mark_nll


def mixed_hidden(
    base_hidden: Tensor, thought_hidden: Tensor, mixing_weight: Tensor, base_index: Tensor | None
) -> Tensor:
    """(1 − w) · base + w · thought, rounded to the dtype of the hidden states as the head would get them."""
    if base_index is not None:
        base_hidden = base_hidden.index_select(0, base_index)
    mixed = torch.lerp(widen(base_hidden), widen(thought_hidden), widen(mixing_weight)[:, None])
    return mixed.to(thought_hidden.dtype)


def row_nll(
    hidden: Tensor, weight: Tensor, target: Tensor, suppress: Tensor | None, temperature: float, absent: Tensor
) -> Tensor:
    """Per-row nll [rows]; ``target`` marked as in ``_vocabulary``. What rows that are ``absent`` hold has no effect."""
    hidden = hidden.masked_fill(absent[:, None], 0)
    logits = F.linear(widen(hidden), widen(weight)) / temperature
    if suppress is not None:
        logits = logits.index_fill(-1, suppress, float("-inf"))
    return mark_nll(F.cross_entropy(logits, target.clamp_min(0), reduction="none"), target)
