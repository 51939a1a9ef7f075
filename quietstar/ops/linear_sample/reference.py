"""The specification of sampling: dense logits, dense noise, argmax."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quietstar.ops._precision import widen
from quietstar.ops._vocabulary import cap_logits
from quietstar.ops.linear_sample.inputs import Sampling, best_token
from quietstar.ops.linear_sample.noise import GROUP, arrivals, first_arrivals


def keep_most_likely(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Replace the logits of all but the most likely tokens by −∞. Equally likely tokens are kept or dropped together.

    NaN and +∞ are always kept.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None:
        ordered = logits.sort(dim=-1, descending=True).values
        probabilities = (ordered / temperature).softmax(dim=-1)
        likelier = probabilities.cumsum(dim=-1) - probabilities  # total probability of the tokens before each
        last = ((likelier < top_p).sum(dim=-1, keepdim=True) - 1).clamp_min(0)  # −1 where they are NaN
        logits = logits.masked_fill(logits < ordered.gather(-1, last), float("-inf"))
    return logits


def linear_sample(hidden: Tensor, weight: Tensor, sampling: Sampling) -> Tensor:
    """Draw token ids [rows]; ``inputs.NO_TOKEN`` where none can be drawn."""
    logits = cap_logits(F.linear(widen(hidden), widen(weight)), sampling.softcap)
    if sampling.suppress is not None:
        logits = logits.index_fill(-1, sampling.suppress, float("-inf"))
    if sampling.temperature == 0:
        return best_token(logits)
    logits = keep_most_likely(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    vocabulary = logits.shape[1]
    groups = torch.arange(-(-vocabulary // GROUP), device=logits.device)
    rows = torch.arange(logits.shape[0], device=logits.device)
    first, places = first_arrivals(sampling.seed, rows, len(groups))
    times = arrivals(sampling.seed, rows[:, None], groups.expand_as(first), first, places).flatten(1)[:, :vocabulary]
    return best_token(logits / sampling.temperature - times.log())
