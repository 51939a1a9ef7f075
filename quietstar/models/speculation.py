"""Self-speculative thought decoding: the base model drafts, the thinking model checks all drafts at once.

A thought costs k + 1 passes behind the base pass, but thoughts behind many positions cost about as much as behind one,
since the weights are read once for all. A round of n drafts:

1. the base model drafts n tokens, one pass each; its cache keeps them;
2. thoughts are sampled behind the n + 1 positions, all anchors in one batch: k + 1 passes;
3. a draft is accepted with probability min(1, p_think / p_base); the first rejected one is replaced by a draw from
   the positive part of p_think − p_base, normalised. Behind the last accepted draft p_think gives one token more;
4. rejected tokens are forgotten by moving the end of the text, each row of the batch by itself.

The text is distributed exactly as if every token were drawn from p_think (Leviathan, Kalman, Matias, arXiv 2211.17192,
theorem 3.5): given the text before it, a thought is independent of the draft it judges. Positions where the model does
not think have p_think = p_base, and their drafts are always accepted. n = 0 is thinking token by token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LONGEST_DRAFT = 16  # of draft_length="auto"


@dataclass(frozen=True)
class Thinking:
    """Checked options of ``generate``, described there."""

    draft_length: int | Literal["auto"] | None = None
    think: float | Literal["always", "never"] = "always"
    return_thoughts: bool = False

    def __post_init__(self):
        n, think = self.draft_length, self.think
        if n not in (None, "auto"):
            if isinstance(n, bool) or not isinstance(n, int):
                raise TypeError(f"draft_length must be None, 'auto' or an integer >= 1, got {n!r}")
            if n < 1:
                raise ValueError(f"draft_length must be None, 'auto' or an integer >= 1, got {n}")
        if think not in ("always", "never"):
            if isinstance(think, bool) or not isinstance(think, int | float):
                raise TypeError(f"think must be 'always', 'never' or a threshold in nats >= 0, got {think!r}")
            if not think >= 0:
                raise ValueError(f"think must be 'always', 'never' or a threshold in nats >= 0, got {think}")
        if not isinstance(self.return_thoughts, bool):
            raise TypeError(f"return_thoughts must be True or False, got {self.return_thoughts!r}")

    @property
    def plain(self) -> bool:
        """Whether this is what transformers' own loops do."""
        return self == Thinking()


class DraftLength:
    """How many tokens to draft in a round, and how the drafts fared.

    With ``"auto"``: the length with the most tokens per pass. If each draft is accepted with probability a, a round of
    n drafts yields (1 − aⁿ⁺¹) / (1 − a) tokens (arXiv 2211.17192, equation 1) for n + 1 base and k + 1 thought passes.
    """

    def __init__(self, draft_length: int | Literal["auto"] | None, thought_length: int):
        self.fixed = 0 if draft_length is None else draft_length
        self.thought_passes = thought_length + 1
        self.drafted = self.accepted = 0

    @property
    def longest(self) -> int:
        return LONGEST_DRAFT if self.fixed == "auto" else self.fixed

    def __call__(self) -> int:
        if self.fixed != "auto":
            return self.fixed
        rate = (self.accepted + 4) / (self.drafted + 5)  # as if 4 of 5 had been accepted before
        return max(
            range(1, LONGEST_DRAFT + 1),
            key=lambda n: (1 - rate ** (n + 1)) / (1 - rate) / (n + 1 + self.thought_passes),
        )

    def learn(self, accepted: Sequence[int], length: int) -> None:
        """Count a round: accepted drafts of each row, of ``length``. The first rejected one was compared too."""
        self.accepted += sum(accepted)
        self.drafted += sum(min(count + 1, length) for count in accepted)


def verify(drafts: Tensor, draft_scores: Tensor, scores: Tensor, do_sample: bool) -> tuple[Tensor, Tensor]:
    """Which drafts the thinking model accepts, and its own token behind them.

    Args:
        drafts: int64 [B, n], drawn from softmax(draft_scores), or its argmax.
        draft_scores, scores: [B, n + 1, V], of the base model and of the thinking model behind the same texts, after
            logits processors.
        do_sample: speculative sampling; else accept what is the argmax of ``scores``.

    Returns:
        Accepted drafts int64 [B], from 0 to n, and the next token int64 [B].
    """
    n = drafts.shape[1]
    row = torch.arange(len(drafts), device=drafts.device)
    if not do_sample:
        wanted = scores.argmax(dim=-1)
        accepted = (drafts == wanted[:, :n]).cumprod(dim=1).sum(dim=1)
        return accepted, wanted[row, accepted]
    p, q = scores.softmax(dim=-1), draft_scores.softmax(dim=-1)
    p_draft, q_draft = (x[:, :n].gather(-1, drafts[..., None]).squeeze(-1) for x in (p, q))
    kept = torch.rand_like(q_draft) * q_draft < p_draft
    accepted = kept.cumprod(dim=1).sum(dim=1)
    p_next = p[row, accepted]
    rest = (p_next - q[row, accepted]).clamp_min(0)
    # Behind the last draft nothing was rejected; and where p = q but for rounding, nothing may be left over.
    whole = (accepted == n) | (rest.sum(dim=-1) == 0)
    return accepted, torch.multinomial(torch.where(whole[:, None], p_next, rest), 1).squeeze(1)
