"""The row kernel of the ``torch`` backend.

Drawing noise for every token costs several times the matmul at hidden size 256, so it is drawn only for tokens that can
win. The largest logit of a group and the first arrival in it bound the score of all its tokens. The groups with the
largest bounds are drawn first, then those whose bound reaches the best score so far. The resulting tokens are exactly
the same as if all noise were drawn.
"""

from functools import partial

import torch
from torch import Tensor

from quietstar.ops._rows import BLOCK_BYTES, rows_within, slices
from quietstar.ops.linear_sample.chunks import cap_and_suppress_, sample_in_chunks
from quietstar.ops.linear_sample.inputs import NO_TOKEN, Sampling, best_token
from quietstar.ops.linear_sample.noise import GROUP, arrivals, first_arrivals
from quietstar.ops.linear_sample.reference import keep_most_likely

# Groups drawn before any is ruled out. For flat logits one is enough; more are drawn where needed.
_FIRST_DRAWN = 4

# Groups whose tokens are drawn in one call: about 20 MiB of noise.
_DRAWN_TOGETHER = 1 << 14

# Added to bounds, because computed logarithms are not monotonic to the last bit; their error is far smaller than this.
_SLACK = 1e-5


def sample_rows(logits: Tensor, first_row: int, sampling: Sampling) -> Tensor:
    """One token per row of a chunk of logits: see ``.chunks.SampleKernel``."""
    cap_and_suppress_(logits, sampling)
    if sampling.filtered:
        for part in slices(len(logits), rows_within(BLOCK_BYTES, logits[0].nbytes, logits.device)):
            logits[part] = keep_most_likely(logits[part], sampling.temperature, sampling.top_k, sampling.top_p)
    rows = torch.arange(first_row, first_row + len(logits), device=logits.device)
    return _Race(logits, rows, sampling.seed, sampling.temperature).winner()


class _Race:
    """The race between the tokens of some rows (see ``noise.py``), run group by group."""

    def __init__(self, logits: Tensor, rows: Tensor, seed: Tensor, temperature: float):
        self.rows, self.seed, self.temperature = rows, seed, temperature
        self.shape = logits.shape[0], logits.shape[1] // GROUP
        self.logits = logits.view(*self.shape, GROUP).flatten(0, 1)
        self.first, self.places = first_arrivals(seed, rows, self.shape[1])
        # The best score of every group, and the place of its token. Groups that are not drawn cannot win.
        self.score = logits.new_full(self.shape, float("-inf"))
        self.place = torch.zeros_like(self.places)

    def winner(self) -> Tensor:
        if self.logits.device.type != "cpu":  # ruling groups out would wait for the device
            self._draw(torch.arange(self.logits.shape[0], device=self.logits.device))
        else:
            self._draw_what_can_win()
        group = best_token(self.score)
        place = self.place.gather(1, group.clamp_min(0)[:, None]).squeeze(1)
        return (group * GROUP + place).masked_fill_(group == NO_TOKEN, NO_TOKEN)

    def _draw_what_can_win(self) -> None:
        rows, groups = self.shape
        largest = self.logits.amax(dim=1).view(self.shape)
        bound = largest.div_(self.temperature).sub_(self.first.log().sub_(_SLACK))
        likeliest = bound.topk(min(_FIRST_DRAWN, groups), dim=1).indices
        self._draw((likeliest + torch.arange(rows)[:, None] * groups).flatten())
        bound.scatter_(1, likeliest, float("-inf"))
        best = self.score.amax(dim=1, keepdim=True)
        self._draw((bound >= best).flatten().nonzero().squeeze(1))

    def _draw(self, chosen: Tensor) -> None:
        """Draw the tokens of the chosen groups, which are numbered consecutively over all rows."""
        for part in slices(chosen.shape[0], _DRAWN_TOGETHER):
            some = chosen[part]
            row, group = some // self.shape[1], some % self.shape[1]
            times = arrivals(self.seed, self.rows[row], group, self.first[row, group], self.places[row, group])
            scores = self.logits.index_select(0, some).div_(self.temperature).sub_(times.log_())
            self.score[row, group], self.place[row, group] = scores.max(dim=1)


sample = partial(sample_in_chunks, sample_rows)
