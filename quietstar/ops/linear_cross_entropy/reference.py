"""The specification of the linear cross-entropies: dense logits, PyTorch's cross-entropy, gradients by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quietstar.ops._precision import widen
from quietstar.ops._vocabulary import Softmax, cap_logits, mark_rows
from quietstar.ops.linear_cross_entropy.inputs import Call, Hidden


def input_rows(hidden: Hidden, absent: Tensor) -> Tensor:
    """Return the head's input [rows, H], with 0 in rows that are ``absent``, so that what they hold has no effect.

    The mix (1 − w) · base + w · thought is rounded to the dtype of the hidden states, the dtype of the head's input.
    """
    rows, thought, mixing_weight, base_index = hidden
    if thought is not None:
        base = rows if base_index is None else rows.index_select(0, base_index)
        mixing_weight = widen(mixing_weight.masked_fill(absent, 0))[:, None]
        rows = torch.lerp(widen(base), widen(thought), mixing_weight).to(thought.dtype)
    return rows.masked_fill(absent[:, None], 0)


def log_probabilities(hidden: Tensor, weight: Tensor, softmax: Softmax) -> Tensor:
    """Compute log-probabilities [rows, V], −∞ for suppressed tokens."""
    logits = cap_logits(F.linear(widen(hidden), widen(weight)), softmax.softcap) / softmax.temperature
    if softmax.suppress is not None:
        logits = logits.index_fill(-1, softmax.suppress, float("-inf"))
    return logits.log_softmax(dim=-1)


def nll_and_entropy(call: Call, absent: Tensor) -> tuple[Tensor, Tensor]:
    """Compute nll and entropy of every row, [rows]. What ``absent`` rows hold has no effect."""
    logs = log_probabilities(input_rows(call.hidden, absent), call.weight, call.softmax)
    nll = -logs.gather(-1, call.target.clamp_min(0)[:, None]).squeeze(-1)
    entropy = -(logs.exp() * logs.masked_fill(logs == float("-inf"), 0)).sum(dim=-1)
    return mark_rows(nll, call.target), mark_rows(entropy, call.target)


def counted_nll_and_entropy(call: Call) -> tuple[Tensor, Tensor]:
    """Compute nll and entropy of every row; rows that do not contribute to the loss get no gradient."""
    ignored = call.target < 0
    if call.scales is None:
        return nll_and_entropy(call, ignored)
    weightless = ~call.scales.contributing
    with torch.no_grad():
        every = nll_and_entropy(call, ignored)
    counting = nll_and_entropy(call, ignored | weightless)
    return tuple(torch.where(weightless, *both) for both in zip(every, counting, strict=True))
