"""What thinking at only some positions is worth: predictions against the share of positions that think."""

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
    """Predictions of tokens, if the model thinks in front of a share of them only."""

    share: float  # of all tokens
    threshold: float  # that gives it: for ``gain_threshold`` or ``think``; −inf where all think
    nll: Mean  # in nats
    accuracy: Mean  # share of tokens that are the likeliest


class _Tokens(NamedTuple):
    """Of every token but the first of each window, [windows, L−1]; after a thought: means over N."""

    base_nll: Tensor
    mixed_nll: Tensor
    base_right: Tensor
    mixed_right: Tensor
    entropy: Tensor  # of the base prediction
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
    """What is lost by thinking in front of some tokens only, for three ways to choose them.

    ``"learned"`` (of models with a gain head) takes those where the head expects the largest gain, as ``generate`` does
    with ``think="learned"``; ``"entropy"`` those where the base prediction has the most, as with a threshold for
    ``think``; ``"random"`` any. All go by the same pass and the same thoughts: in front of the tokens taken the mixed
    prediction stands, elsewhere that without a thought.

    Args:
        model: on the device of the windows; put into evaluation mode while this runs.
        windows: int64 [windows, L], without padding.
        shares: of all tokens, each from 0 to 1; rounded to whole tokens.
        chosen: bool [windows, L−1], the tokens to measure, token i+1 at i, such as answers; default all.
        batch_size: windows per forward pass.
        seed: of the thoughts and the random tokens; the state of the random number generators is left as it was.
        progress: wraps the batches, to show progress.

    Returns:
        A point for each share, by way.

    Raises:
        TypeError, ValueError: a bad argument, named.
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
    """The likeliest tokens, and the entropies as ``generate`` takes them, behind ``hidden`` [..., H]."""
    predictor, tokens, entropies = model.predictor(), [], []
    rows = hidden.flatten(0, -2)
    for part in rows.split(rows_within(BLOCK_BYTES, 4 * model.config.vocab_size, rows.device)):
        logits = predictor.text_logits(part).float()
        tokens.append(logits.argmax(dim=-1))
        entropies.append(torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1))
    return torch.cat(tokens).view(hidden.shape[:-1]), torch.cat(entropies).view(hidden.shape[:-1])


def _point(tokens: _Tokens, score: Tensor, chosen: Tensor | None, share: float) -> CurvePoint:
    """Thinking in front of that share of the tokens whose score is highest, measured on the ``chosen`` ones."""
    scores = score.flatten()
    order = scores.argsort(descending=True, stable=True)
    count = round(share * len(order))
    thinks = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, order[:count], True).view(score.shape)
    threshold = float(scores[order[count]]) if count < len(order) else -torch.inf
    nll = torch.where(thinks, tokens.mixed_nll, tokens.base_nll)
    right = torch.where(thinks, tokens.mixed_right, tokens.base_right)
    return CurvePoint(count / len(order), threshold, token_mean(nll, chosen), token_mean(right, chosen))
