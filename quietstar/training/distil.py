"""Distillation: the prediction without thoughts is trained by a frozen teacher that thinks.

There are two losses, each a fused linear cross-entropy, so that no logits [rows, V] are stored.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quietstar.models import QuietStarForCausalLM
from quietstar.models.documents import IGNORE_INDEX, at_anchors, document_starts, text_labels
from quietstar.models.layouts import BaseStates, TextRows
from quietstar.models.predictor import Predictor
from quietstar.models.text import Text

Distillation = Literal["kl", "reward"]
DISTILLATIONS = "kl", "reward"


class Lesson(NamedTuple):
    """The teacher's predictions for texts, int64 and float [B, L−1]."""

    drawn: Tensor  # a token drawn from its distribution after a thought
    nll: Tensor  # nll of the next token after a thought; 0 where there is no label


class _Rows(NamedTuple):
    """A text in a pass."""

    text: Text
    starts: Tensor | None
    labels: Tensor  # [B, L−1], the next tokens; −100 where there is none

    @classmethod
    def of(cls, labels: Tensor, text: dict[str, Tensor]) -> "_Rows":
        given = Text.of(*(text.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")))
        starts = document_starts(given.attention_mask, given.position_ids, given.shape)
        return cls(given, starts, text_labels(labels, given.attention_mask, starts)[:, 1:])

    def base(self) -> BaseStates:
        return BaseStates(TextRows(torch.arange(self.text.shape[1], device=self.text.device)[None], self.starts))


@torch.no_grad()
def teach(teacher: QuietStarForCausalLM, labels: Tensor, text: dict[str, Tensor]) -> Lesson:
    """Let the teacher think once after every position.

    Args:
        teacher: a thinking model.
        labels: int64 [B, L].
        text: those arguments of the model's forward pass that specify the text.
    """
    parts, rows = teacher.predictor(), _Rows.of(labels, text)
    positions = rows.text.positions()
    anchors = torch.arange(rows.text.shape[1], device=labels.device).expand(rows.text.shape)
    thinker = parts.thinker(rows.base(), anchors, positions, at_anchors(rows.starts, anchors[0]))
    plain = thinker.read(rows.text.embedded(parts.decoder.embed), positions)
    thoughts = thinker.sample(teacher.config.thought_temperature, parts.thought_token_ids, None)
    hidden = thinker.finish(thoughts)
    hidden = torch.lerp(plain, hidden, parts.mixing_head(plain, hidden)[..., None].to(plain.dtype))
    hidden, target = hidden[:, :-1].flatten(0, 1), rows.labels.flatten()
    seed = torch.randint(2**62, (), device=labels.device)
    drawn = parts.head.draw(hidden, temperature=1.0, suppress=parts.thought_token_ids, seed=seed)
    nll = parts.head.cross_entropy(hidden, target, ignore_index=IGNORE_INDEX, reduction="none")
    return Lesson(drawn.view(rows.labels.shape), nll.view(rows.labels.shape))


def learn(
    model: QuietStarForCausalLM, labels: Tensor, text: dict[str, Tensor], lesson: Lesson, how: Distillation
) -> tuple[Tensor, Tensor]:
    """Compute the loss of the prediction without a thought, a mean over labelled tokens, and its nll [B, L−1].

    ``"kl"`` is our own: half the loss of the text, half the loss of tokens drawn by the teacher. In expectation the
    latter has the gradient of KL(teacher after a thought ‖ model without).

    ``"reward"`` is Fast Quiet-STaR's: −r · log p of the text, where r = nll of the teacher − nll of the model, without
    gradient. Negative rewards count as 0, as in the authors' code; otherwise tokens that the teacher predicts better
    would become less likely.
    """
    parts, rows = model.predictor(), _Rows.of(labels, text)
    hidden = _plain_hidden(parts, rows)[:, :-1].flatten(0, 1)
    target = rows.labels.flatten()
    known = target != IGNORE_INDEX
    count = known.sum().clamp_min(1)
    with torch.no_grad():
        nll = parts.head.cross_entropy(hidden, target, ignore_index=IGNORE_INDEX, reduction="none")
    if how == "reward":
        weight = (lesson.nll.flatten() - nll).clamp_min(0) / count
    else:
        hidden = hidden.repeat(2, 1)
        target = torch.cat([target, lesson.drawn.flatten().masked_fill(~known, IGNORE_INDEX)])
        weight = (0.5 / count).expand(target.shape)
    loss = parts.head.cross_entropy(hidden, target, ignore_index=IGNORE_INDEX, reduction="sum", row_weight=weight)
    return loss, nll.view(rows.labels.shape)


def _plain_hidden(parts: Predictor, rows: _Rows) -> Tensor:
    """Compute the hidden states [B, L, H] of the text without thoughts."""
    return parts.decoder(rows.text.embedded(parts.decoder.embed), rows.text.positions(), rows.base())
