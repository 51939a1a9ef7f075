"""Training of the gain head, which predicts what a thought will gain and so learns where to think."""

from torch import Tensor, nn

from quietstar.models.configuration import QuietStarConfig
from quietstar.models.documents import IGNORE_INDEX


def require_gain_head(head: nn.Module | None, config: QuietStarConfig) -> nn.Module:
    """Return the gain head of a model.

    Raises:
        ValueError: the model has none.
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
    """Compute the mean squared error of predicted gains. It is minimised by predicting the expected gain.

    Args:
        predicted: [B, L−1], the head's predictions at every position that has a next token.
        base_nll: [B, L−1], of the next token without a thought.
        talk_nll: [B, N, L−1 or A, M], after each of N thoughts; the first of the M tokens counts.
        labels: int [B, L], −100 is ignored; from ``text_labels``.
        anchors: int64 [B, A], the positions that thought, −1 for none; None means all of them.

    Returns:
        A scalar in nats², 0 where no thought was measured; its gradient is that of ``predicted`` alone.
    """
    measured = labels[:, 1:] != IGNORE_INDEX
    if anchors is not None:
        here = anchors.clamp(0, base_nll.shape[1] - 1)
        measured = measured.gather(1, here) & (anchors == here)
        predicted, base_nll = predicted.gather(1, here), base_nll.gather(1, here)
    gain = (base_nll - talk_nll[..., 0].mean(dim=1)).detach()
    error = (predicted - gain).square().masked_fill(~measured, 0)  # in the wider dtype, that of the nll
    return error.sum() / measured.sum().clamp_min(1)
