"""Which token wins a row: the best of its scores, or none."""

from torch import Tensor

from quietstar.ops._checks import can_read_values

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
