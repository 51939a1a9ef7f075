"""The quality of predictions as a function of the share of positions that think."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quietstar._numbers import SEED, Interval
from quietstar.evaluation.held_out import check_windows, evaluating, predict
from quietstar.evaluation.means import Mean, token_mean
from quietstar.models import QuietStarForCausalLM
from quietstar.ops._rows import BLOCK_BYTES, rows_within

SIXTEENTHS = tuple(i / 16 for i in range(17))


class CurvePoint(NamedTuple):
    """The quality of predictions if the model thinks before only a share of tokens."""

    share: float  # share of all tokens
    threshold: float  # value of ``gain_threshold`` or ``think`` that gives this share; −inf if all think
    nll: Mean  # in nats
    accuracy: Mean  # share of tokens that are the most likely prediction


class _Tokens(NamedTuple):
    """Measurements for every token except the first of each window, [windows, L−1]; after a thought, means over N."""

    base_nll: Tensor
    mixed_nll: Tensor
    base_right: Tensor
    mixed_right: Tensor
    entropy: Tensor  # entropy of the base prediction
    expected_gain: Tensor | None


@torch.no_grad()
def thinking_curve(
    model: QuietStarForCausalLM,
    windows: Tensor,
    *,
    shares: Sequence[float] = SIXTEENTHS,
    chosen: Tensor | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> dict[str, list[CurvePoint]]:
    """Measure predictions when the model thinks before only some tokens, for three ways to choose these tokens.

    ``"learned"`` (for models with a gain head) chooses the tokens for which the head expects the largest gain, as
    ``generate`` does with ``think="learned"``. ``"entropy"`` chooses those whose base prediction has the most entropy,
    as with a threshold for ``think``. ``"random"`` chooses random ones. All use the same pass and the same thoughts:
    the mixed prediction for chosen tokens, and the prediction without a thought for the others.

    Args:
        model: the model, on the device of the windows; in evaluation mode during the call.
        windows: int64 [windows, L], without padding.
        shares: shares of all tokens, each from 0 to 1; rounded to whole tokens.
        chosen: bool [windows, L−1], the tokens to measure, such as answers, with token i+1 at i. Default: all.
        batch_size: windows per forward pass.
        seed: seed of the thoughts and the random choice. The state of the random number generators is restored.
        progress: wraps the batches, to show progress.

    Returns:
        For each way of choosing, one point per share.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    check_windows(windows)
    for share in shares:
        Interval(float, "[0, 1]").check("shares", share)
    if chosen is not None and chosen.shape != windows[:, 1:].shape:
        raise ValueError(f"chosen must have shape {list(windows[:, 1:].shape)}, got {list(chosen.shape)}")
    Interval(int, "[1, inf)").check("batch_size", batch_size)
    SEED.check("seed", seed)
    with evaluating(model, seed):
        parts = [_tokens(model, batch) for batch in progress(windows.split(batch_size))]
        tokens = _Tokens(*(None if None in column else torch.cat(column) for column in zip(*parts, strict=True)))
        worth = {"learned": tokens.expected_gain, "entropy": tokens.entropy, "random": torch.rand(tokens.entropy.shape)}
    return {
        way: [_point(tokens, score.to(windows.device), chosen, share) for share in shares]
        for way, score in worth.items()
        if score is not None
    }


def _tokens(model: QuietStarForCausalLM, batch: Tensor) -> _Tokens:
    output, base, thought = predict(model, batch, model.sample_thoughts(batch))
    weight = output.mixing_weight[..., 0].transpose(1, 2).unsqueeze(3)  # [B, L−1, N, 1]
    following = batch[:, 1:]
    likeliest, entropy = _predictions(model, base)
    mixed, _ = _predictions(model, torch.lerp(base.unsqueeze(2), thought, weight.to(thought.dtype)))
    return _Tokens(
        output.base_nll,
        output.talk_nll[..., 0].mean(dim=1),
        (likeliest == following).float(),
        (mixed == following[..., None]).float().mean(dim=2),
        entropy,
        output.expected_gain,
    )


def _predictions(model: QuietStarForCausalLM, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most likely tokens, and the entropies as ``generate`` computes them, from ``hidden`` [..., H]."""
    predictor, tokens, entropies = model.predictor(), [], []
    rows = hidden.flatten(0, -2)
    for part in rows.split(rows_within(BLOCK_BYTES, 4 * model.config.vocab_size, rows.device)):
        logits = predictor.text_logits(part).float()
        tokens.append(logits.argmax(dim=-1))
        entropies.append(torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1))
    return torch.cat(tokens).view(hidden.shape[:-1]), torch.cat(entropies).view(hidden.shape[:-1])


def _point(tokens: _Tokens, score: Tensor, chosen: Tensor | None, share: float) -> CurvePoint:
    """Think before the ``share`` of tokens with the highest score, and measure the ``chosen`` tokens."""
    scores = score.flatten()
    order = scores.argsort(descending=True, stable=True)
    count = round(share * len(order))
    thinks = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, order[:count], True).view(score.shape)
    threshold = float(scores[order[count]]) if count < len(order) else -torch.inf
    nll = torch.where(thinks, tokens.mixed_nll, tokens.base_nll)
    right = torch.where(thinks, tokens.mixed_right, tokens.base_right)
    return CurvePoint(count / len(order), threshold, token_mean(nll, chosen), token_mean(right, chosen))
