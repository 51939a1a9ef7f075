"""The specification of mixing: the mix is stored, then PyTorch's cross-entropy; gradients by autograd."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from quietstar.ops._precision import widen
from quietstar.ops._vocabulary import mark_rows


class _Zeroed(torch.autograd.Function):
    """Zero the tensor where ``where`` is True, but pass its gradient on unchanged."""

    @staticmethod
    def forward(ctx, tensor, where):
        return tensor.masked_fill(where, 0)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def mixed(base_logits: Tensor, thought_logits: Tensor, mixing_weight: Tensor) -> Tensor:
    """Compute (1 − w) · base + w · thought in the compute dtype; for infinities see ``mixed_infinities``.

    Gradients are those of the formula, except that infinities do not contribute to that of w.
    """
    base, thought = widen(base_logits), widen(thought_logits)
    weight = mixing_weight[..., None].to(base.dtype)
    infinite = base.isinf() | thought.isinf()
    mix = torch.lerp(_Zeroed.apply(base, infinite), _Zeroed.apply(thought, infinite), weight)
    return mix + mixed_infinities(base.detach(), thought.detach(), weight.detach()).masked_fill(~infinite, 0)


def mixed_infinities(base: Tensor, thought: Tensor, weight: Tensor) -> Tensor:
    """Mix with the weight [..., 1]: −∞ if both are −∞, else the sum, where −∞ of weight exactly 0 adds nothing."""
    no_base, no_thought = base.isneginf(), thought.isneginf()
    of_base = ((1 - weight) * base).masked_fill_(no_base & (weight == 1), 0)
    of_thought = (weight * thought).masked_fill_(no_thought & (weight == 0), 0)
    return of_base.add_(of_thought).masked_fill_(no_base & no_thought, -math.inf)


def mixed_nll(base_logits: Tensor, thought_logits: Tensor, mixing_weight: Tensor, target: Tensor) -> Tensor:
    """Compute the per-row nll [...]; ``target`` is marked as in ``_vocabulary``."""
    absent = (target < 0)[..., None]
    base_logits, thought_logits = base_logits.masked_fill(absent, 0), thought_logits.masked_fill(absent, 0)
    log_probabilities = F.log_softmax(mixed(base_logits, thought_logits, mixing_weight), dim=-1)
    nll = -log_probabilities.gather(-1, target.clamp_min(0)[..., None]).squeeze(-1)
    return mark_rows(nll, target)
