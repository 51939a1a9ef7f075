"""The specification: the mix written out, PyTorch's cross-entropy, gradients by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quietstar.ops._precision import widen
from quietstar.ops._vocabulary import mark_nll


def mixed(base_logits: Tensor, thought_logits: Tensor, mixing_weight: Tensor) -> Tensor:
    """(1 − w) · base + w · thought, in the compute dtype."""
    base = widen(base_logits)
    return torch.lerp(base, widen(thought_logits), mixing_weight[..., None].to(base.dtype))


def mixed_nll(base_logits: Tensor, thought_logits: Tensor, mixing_weight: Tensor, target: Tensor) -> Tensor:
    """Per-row nll [...]; ``target`` marked as in ``_vocabulary``."""
    absent = (target < 0)[..., None]
    base_logits, thought_logits = base_logits.masked_fill(absent, 0), thought_logits.masked_fill(absent, 0)
    log_probabilities = F.log_softmax(mixed(base_logits, thought_logits, mixing_weight), dim=-1)
    nll = -log_probabilities.gather(-1, target.clamp_min(0)[..., None]).squeeze(-1)
    return mark_nll(nll, target)
