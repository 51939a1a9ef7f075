"""Where to think is learned too: how the head that predicts what a thought will gain is trained."""

from torch import Tensor, nn

from quietstar.models.configuration import QuietStarConfig
from quietstar.models.documents import IGNORE_INDEX


def require_gain_head(head: nn.Module | None, config: QuietStarConfig) -> nn.Module:
    """The gain head of a model.

    Raises:
        ValueError: it has none.
    """
    if head is None:
        raise ValueError(
            "gain_weight must be > 0 when a model is made or loaded, for it to have the gain head of think='learned', "
            f"got a model without one and gain_weight {config.gain_weight:g}"
        )
    return head


def gain_loss(
    predicted: Tensor, base_nll: Tensor, talk_nll: Tensor, labels: Tensor, anchors: Tensor | None
) -> Tensor:  # fmt: skip
    """Mean squared error of predicted gains: the mean of what is measured is then the best that can be said.

    Args:
        predicted: [B, L−1], by the head, behind every position that has a next token.
        base_nll: [B, L−1], of the next token without a thought.
        talk_nll: [B, N, L−1 or A, M], after each of N thoughts; the first of the M tokens counts.
        labels: int [B, L], −100 is ignored; from ``text_labels``.
        anchors: int64 [B, A], the positions that thought, −1 for none; None is all of them.

    Returns:
        A scalar in nats², 0 where no thought was measured; its gradient is that of ``predicted`` alone.
    """
    measured = labels[:, 1:] != IGNORE_INDEX
    if anchors is not None:
        here = anchors.clamp(0, base_nll.shape[1] - 1)
        measured = measured.gather(1, here) & (anchors == here)
        predicted, base_nll = predicted.gather(1, here), base_nll.gather(1, here)
    gain = (base_nll - talk_nll[..., 0].mean(dim=1)).detach()
    error = (predicted - gain).square().masked_fill(~measured, 0)  # in the dtype of the nll, which is the wider
    return error.sum() / measured.sum().clamp_min(1)
