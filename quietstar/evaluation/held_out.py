"""Predictions of a model for held-out text, token by token, without and with thoughts."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from quietstar._numbers import SEED, Interval
from quietstar.models import QuietStarForCausalLM, QuietStarOutput
from quietstar.models.controls import random_like, shuffle_thoughts

# Fields of the configuration for a pass that thinks after every token and needs no teacher.
_EVERYWHERE = {
    "lookahead": 1, "anchors_per_text": None, "anchor_choice": "random", "baseline": "self", "kl_weight": 0.0,
    "clip_ratio": None,
}  # fmt: skip

Thoughts = Literal["own", "shuffled", "random"] | Tensor | None


class HeldOutNll(NamedTuple):
    """Negative log-likelihoods of held-out tokens in nats, float [windows, L−1], token i+1 at i.

    Values that depend on a thought are means over the N thoughts of a position.
    """

    base: Tensor  # nll of the prediction without a thought
    mixed: Tensor  # nll of the prediction after a thought, mixed with the one without
    thought: Tensor  # nll of the prediction after a thought alone, as if its weight were 1
    mixing_weight: Tensor  # [windows, L−1], weight of the thought in the mixed prediction
    thought_tokens: Tensor  # int64 [windows, N, L, k], the thoughts after every token


@torch.no_grad()
def held_out_nll(
    model: QuietStarForCausalLM,
    windows: Tensor,
    *,
    thoughts: Thoughts = "own",
    thought_length: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> HeldOutNll:
    """Compute the nll of every token of ``windows`` except the first of each, without and with thoughts.

    Args:
        model: the model, on the device of the windows; in evaluation mode during the call.
        windows: int64 [windows, L], without padding.
        thoughts: ``"own"``: the model's own thoughts, ``config.num_thoughts`` after every token. As controls,
            ``"shuffled"``: the same thoughts, each after a token other than its own; ``"random"``: tokens drawn from
            the whole vocabulary; None: no thoughts, so that every prediction is the base's and every weight is 0.
            A tensor int64 [windows, N, L, k] gives the thoughts.
        thought_length: k of thoughts that are not given. Default: ``config.thought_length``.
        batch_size: windows per forward pass.
        seed: seed of the thoughts. The state of the random number generators is restored.
        progress: wraps the batches, to show progress.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    check_windows(windows, thoughts, thought_length)
    Interval(int, "[1, inf)").check("batch_size", batch_size)
    SEED.check("seed", seed)
    batches = windows.split(batch_size)
    if thoughts is None:
        with evaluating(model, seed):
            base = torch.cat([_base_nll(model, batch) for batch in progress(batches)])
        none = windows.new_empty(len(windows), model.config.num_thoughts, windows.shape[1], 0)
        return HeldOutNll(base, base, base, torch.zeros_like(base), none)

    count, length = model.config.num_thoughts, thought_length
    if isinstance(thoughts, Tensor):
        count, length = thoughts.shape[1], thoughts.shape[3]
    with evaluating(model, seed, num_thoughts=count, thought_length=length):
        if isinstance(thoughts, str):
            thoughts = _draw(model, batches, thoughts)
        parts = [
            _all_nll(model, batch, given)
            for batch, given in zip(progress(batches), thoughts.split(batch_size), strict=True)
        ]
    return HeldOutNll(*map(torch.cat, zip(*parts, strict=True)), thoughts)


@torch.no_grad()
def text_nll(model: PreTrainedModel, windows: Tensor, *, batch_size: int = 16) -> Tensor:
    """Compute the nll in nats, float [windows, L−1], of every token except the first for a model that does not think.

    It is a measure of the tokens' difficulty for ``gain_by_difficulty``.

    Args:
        model: a model of any family, on the device of the windows; in evaluation mode during the call.
        windows: int64 [windows, L], without padding.
        batch_size: windows per forward pass.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    check_windows(windows)
    Interval(int, "[1, inf)").check("batch_size", batch_size)
    was_training = model.training
    model.eval()
    try:
        return torch.cat([_base_nll(model, batch) for batch in windows.split(batch_size)])
    finally:
        model.train(was_training)


def check_windows(windows: Tensor, thoughts: Thoughts = None, thought_length: int | None = None) -> None:
    """Check windows and thoughts, see ``held_out_nll``."""
    if windows.dim() != 2 or windows.numel() == 0:
        raise ValueError(f"windows must have shape [windows, L] with at least one, got {list(windows.shape)}")
    if isinstance(thoughts, Tensor):
        wanted = [len(windows), windows.shape[1]]
        if thoughts.dim() != 4 or [thoughts.shape[0], thoughts.shape[2]] != wanted or thoughts.shape[1] < 1:
            raise ValueError(
                f"thoughts must have shape [{wanted[0]}, N, {wanted[1]}, k], one row per window and N >= 1, "
                f"got {list(thoughts.shape)}"
            )
    elif thoughts not in ("own", "shuffled", "random", None):
        raise ValueError(f"thoughts must be 'own', 'shuffled', 'random', a tensor or None, got {thoughts!r}")
    if thought_length is None:
        return
    if not isinstance(thoughts, str):
        raise ValueError(f"thought_length must be left out with given thoughts or none, got {thought_length}")
    Interval(int, "[0, inf)").check("thought_length", thought_length)


@contextmanager
def evaluating(model: QuietStarForCausalLM, seed: int, **fields: int | None) -> Iterator[None]:
    """Set evaluation mode, seed, a lookahead of 1 and other fields of the configuration inside the context."""
    config, device, was_training = model.config, model.device, model.training
    fields = _EVERYWHERE | {name: value for name, value in fields.items() if value is not None}
    before = {name: getattr(config, name) for name in fields}
    model.eval()
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
        model.train(was_training)


def _draw(model: QuietStarForCausalLM, batches: Iterable[Tensor], kind: str) -> Tensor:
    """Sample the model's thoughts after every token, or control thoughts, int64 [windows, N, L, k]."""
    own = torch.cat([model.sample_thoughts(batch) for batch in batches])
    if kind == "shuffled":
        return shuffle_thoughts(own)
    if kind == "random":
        return random_like(own, model.config)
    return own


def _base_nll(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Compute the nll [B, L−1] of the prediction without a thought."""
    if isinstance(model, QuietStarForCausalLM):
        return _nll(model, model.model(batch).last_hidden_state[:, :-1], batch[:, 1:])
    # The family's own forward turns hidden states into logits; one window at a time, as logits are large.
    logits = (model(window[None], use_cache=False).logits[0, :-1].float() for window in batch)
    return torch.stack([F.cross_entropy(x, y, reduction="none") for x, y in zip(logits, batch[:, 1:], strict=True)])


def _all_nll(
    model: QuietStarForCausalLM, batch: Tensor, thoughts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute base, mixed and thought-alone nll and the mixing weight, each [B, L−1]."""
    output, _, thought_hidden = predict(model, batch, thoughts)
    following = batch[:, 1:, None].expand(thought_hidden.shape[:3])
    return (
        output.base_nll,
        output.talk_nll[..., 0].mean(dim=1),
        _nll(model, thought_hidden, following).mean(dim=2),
        output.mixing_weight[..., 0].float().mean(dim=1),
    )


def predict(model: QuietStarForCausalLM, batch: Tensor, thoughts: Tensor) -> tuple[QuietStarOutput, Tensor, Tensor]:
    """Run one pass over texts and given thoughts with a lookahead of 1.

    Returns:
        The model's output, and the hidden states that predict the next token without a thought, [B, L−1, H], and after
        the thoughts, [B, L−1, N, H].
    """
    seen: list[tuple[Tensor, ...]] = []  # inputs of the mixing head, [B, L, H] and [B, L−1, N, 1, H]
    hook = model.mixing_head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    try:
        output = model(batch, labels=batch, thought_tokens=thoughts, output_thought_logprobs=False)
    finally:
        hook.remove()
    base_hidden, thought_hidden, *_ = seen[0]
    return output, base_hidden[:, :-1], thought_hidden.squeeze(3)


def _nll(model: QuietStarForCausalLM, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Compute the nll of ``tokens`` [...] predicted from ``hidden`` [..., H], in the shape of the tokens."""
    head = model.predictor().head
    return head.cross_entropy(hidden.flatten(0, -2), tokens.flatten(), reduction="none").view(tokens.shape)
