"""The arguments that say how tokens are drawn, in the form that kernels take, and the choice of a row's token."""

from typing import NamedTuple

from torch import Tensor

from quietstar.ops._checks import can_read_values


class Sampling(NamedTuple):
    """Checked arguments of ``linear_sample``; ``top_k`` and ``top_p`` are None if they exclude no token."""

    seed: Tensor  # int64 scalar on the device of the logits
    temperature: float
    softcap: float | None
    suppress: Tensor | None  # int64 token ids
    top_k: int | None
    top_p: float | None

    @property
    def filtered(self) -> bool:
        """Whether only the most likely tokens may be drawn."""
        return self.top_k is not None or self.top_p is not None


# Returned for a row from which no token can be drawn: a logit is NaN or +∞, or all of them are −∞.
NO_TOKEN = -1


def best_token(scores: Tensor) -> Tensor:
    """Return the token with the largest score of every row [..., V], the lowest on ties; ``NO_TOKEN`` if not finite."""
    token = scores.argmax(dim=-1, keepdim=True)  # NaN counts as the largest
    return token.masked_fill(~scores.gather(-1, token).isfinite(), NO_TOKEN).squeeze(-1)


def check_drawn(tokens: Tensor) -> None:
    """Raise an error for a row without a token if values may be read here; else ``NO_TOKEN`` marks it."""
    if not can_read_values(tokens):
        return
    missing = (tokens == NO_TOKEN).nonzero()
    if len(missing):
        raise ValueError(
            "hidden and weight must give every row logits that are finite, or -inf for some of its tokens, "
            f"got NaN, +inf or nothing but -inf in row {missing[0].item()}"
        )
