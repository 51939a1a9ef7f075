"""What thoughts are worth on text the model has not seen: the two predictions of one model, token by token."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from quietstar._numbers import SEED, Interval
from quietstar.models import QuietStarForCausalLM


class HeldOutNll(NamedTuple):
    """Negative log-likelihoods of held-out tokens in nats, float [windows, L−1], token i+1 at i."""

    base: Tensor  # of the prediction without a thought
    mixed: Tensor  # of the prediction after one thought, mean over the thoughts drawn


class Mean(NamedTuple):
    """A mean over tokens and its standard error, with windows as independent draws; NaN for a single window."""

    value: float
    error: float


@torch.no_grad()
def held_out_nll(
    model: QuietStarForCausalLM,
    windows: Tensor,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> HeldOutNll:
    """Both predictions of every token of ``windows`` but the first of each.

    Args:
        model: on its device; put into evaluation mode while this runs.
        windows: int64 [windows, L], without padding.
        batch_size: windows per forward pass.
        seed: of the thoughts; the state of the random number generators is left as it was.
        progress: wraps the batches, to show progress.

    Raises:
        TypeError, ValueError: a batch size or seed that is none, or no windows.
    """
    if windows.dim() != 2 or windows.numel() == 0:
        raise ValueError(f"windows must have shape [windows, L] with at least one, got {list(windows.shape)}")
    Interval(int, "[1, inf)").check("batch_size", batch_size)
    SEED.check("seed", seed)
    device, was_training = windows.device, model.training
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        outputs = [model(batch, labels=batch) for batch in progress(windows.split(batch_size))]
    model.train(was_training)
    return HeldOutNll(
        torch.cat([output.base_nll for output in outputs]),
        torch.cat([output.talk_nll[..., 0].mean(dim=1) for output in outputs]),
    )


def hardest(nll: Tensor, share: float = 0.1) -> Tensor:
    """The tokens with the highest ``nll``, bool like it: ``share`` of all, rounded, more where nll are equal.

    Choose them by a model whose nll is not compared on them: whoever chooses the tokens on which it did worst looks
    worse there than it is.

    Raises:
        TypeError, ValueError: a share outside (0, 1], or no tokens.
    """
    Interval(float, "(0, 1]").check("share", share)
    if nll.numel() == 0:
        raise ValueError(f"nll must hold at least one token, got shape {list(nll.shape)}")
    count = max(1, round(nll.numel() * share))
    return nll >= nll.flatten().topk(count).values[-1]


def token_mean(values: Tensor, chosen: Tensor | None = None) -> Mean:
    """Mean of ``values`` [windows, L−1] over the tokens ``chosen`` (default all).

    The standard error is that of a ratio of sums over windows, since tokens of one text are not independent.

    Raises:
        ValueError: ``chosen`` of another shape.
    """
    if chosen is not None and chosen.shape != values.shape:
        raise ValueError(f"chosen must have the shape of values, {list(values.shape)}, got {list(chosen.shape)}")
    chosen = torch.ones_like(values, dtype=torch.bool) if chosen is None else chosen
    counts = chosen.sum(dim=1).double()
    sums = (values.double() * chosen).sum(dim=1)
    mean = sums.sum() / counts.sum()
    windows = len(values)
    variance = (sums - mean * counts).square().sum() * windows / (windows - 1)
    return Mean(float(mean), float(variance.sqrt() / counts.sum()))
