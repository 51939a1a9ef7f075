"""How tokens are drawn, as it is handed from the public function down to the kernels, and which token wins a row."""

from typing import NamedTuple

from torch import Tensor

from quietstar.ops._checks import can_read_values


class Sampling(NamedTuple):
    """Arguments of ``linear_sample``, checked; ``top_k`` and ``top_p`` are None where they leave no token out."""

    seed: Tensor  # int64 scalar on the device of the logits
    temperature: float
    softcap: float | None
    suppress: Tensor | None  # int64 token ids
    top_k: int | None
    top_p: float | None

    @property
    def filtered(self) -> bool:
        """Whether only the likeliest tokens are drawn."""
        return self.top_k is not None or self.top_p is not None


# In place of the token of a row from which none can be drawn: a logit is NaN or +∞, or all of them are −∞.
NO_TOKEN = -1


def best_token(scores: Tensor) -> Tensor:
    """The lowest of the largest scores of every row [..., V]; ``NO_TOKEN`` unless that score is finite."""
    token = scores.argmax(dim=-1, keepdim=True)  # NaN counts as the largest
    return token.masked_fill(~scores.gather(-1, token).isfinite(), NO_TOKEN).squeeze(-1)


def check_drawn(tokens: Tensor) -> None:
    """A row without a token is an error where values may be read; elsewhere ``NO_TOKEN`` says so."""
    if not can_read_values(tokens):
        return
    missing = (tokens == NO_TOKEN).nonzero()
    if len(missing):
        raise ValueError(
            "hidden and weight must give every row logits that are finite, or -inf for some of its tokens, "
            f"got NaN, +inf or nothing but -inf in row {missing[0].item()}"
        )
