"""The most likely tokens at every position of a text, without and with thoughts."""

from typing import NamedTuple

import torch
from torch import Tensor

from quietstar._numbers import Interval
from quietstar.evaluation.held_out import check_windows, evaluating, predict
from quietstar.models import QuietStarForCausalLM

CHUNK = 2**24  # logits held at a time


class Likeliest(NamedTuple):
    """The ``count`` most likely tokens, in descending order, in place of every token but the first; log p in nats."""

    base_tokens: Tensor  # int64 [windows, L−1, count], without a thought
    base_logprobs: Tensor  # float [windows, L−1, count]
    mixed_tokens: Tensor  # int64 [windows, N, L−1, count], after each thought, mixed with the prediction without
    mixed_logprobs: Tensor  # float [windows, N, L−1, count]


@torch.no_grad()
def likeliest_tokens(
    model: QuietStarForCausalLM, windows: Tensor, thoughts: Tensor, *, count: int = 3, batch_size: int = 16
) -> Likeliest:
    """Find the most likely tokens without and with given thoughts. Logits are held for a few rows at a time.

    Args:
        model: the model, on the device of the windows; in evaluation mode during the call.
        windows: int64 [windows, L], without padding; L >= 3.
        thoughts: int64 [windows, N, L, k], for example those of ``held_out_nll``.
        count: number of most likely tokens.
        batch_size: windows per forward pass.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    Interval(int, f"[1, {model.config.vocab_size}]").check("count", count)
    Interval(int, "[1, inf)").check("batch_size", batch_size)
    check_windows(windows, thoughts)
    parts = []
    with evaluating(model, seed=0, num_thoughts=thoughts.shape[1], thought_length=thoughts.shape[3]):
        for batch, given in zip(windows.split(batch_size), thoughts.split(batch_size), strict=True):
            output, base, thought = predict(model, batch, given)
            weight = output.mixing_weight[..., 0].transpose(1, 2).unsqueeze(3)  # [B, L−1, N, 1]
            mixed = torch.lerp(base.unsqueeze(2), thought, weight).transpose(1, 2)
            parts.append((*_likeliest(model, base, count), *_likeliest(model, mixed, count)))
    return Likeliest(*map(torch.cat, zip(*parts, strict=True)))


def _likeliest(model: QuietStarForCausalLM, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the most likely tokens and their log p [..., count], predicted from ``hidden`` [..., H]."""
    tokens, logprobs = [], []
    head = model.predictor()
    for rows in hidden.flatten(0, -2).split(max(1, CHUNK // model.config.vocab_size)):
        logits = head.logits(rows).float()
        values, indices = logits.topk(count)
        tokens.append(indices)
        logprobs.append(values - logits.logsumexp(dim=-1, keepdim=True))
    shape = *hidden.shape[:-1], count
    return torch.cat(tokens).view(shape), torch.cat(logprobs).view(shape)
