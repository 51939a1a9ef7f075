"""Few thoughts laid out as text, for one library call per layer (generation on a CPU)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quietstar.models.attention import ThoughtCache

# Masks that serve many tokens are made for texts so much longer than the present one.
_MASKED_AHEAD = 256


class ThoughtsAsText:
    """Thoughts laid out as text behind the base keys, all steps there will be; the keys of those to come are masked.

    Made once per thought; what a pass needs, once for all its layers.
    """

    def __init__(self, cache: "ThoughtCache", window: int | None):
        self.cache, self.window, self.end, self.steps = cache, window, cache.base.end, -1
        self.num_anchors, self.max_steps = cache.anchors.shape[-1], cache.max_steps
        self.width = self.end + self.num_anchors * self.max_steps
        self.text: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, end + P·T, D] of a layer, with the new ones [B, Hkv, P·S, D] in their places."""
        if layer not in self.text:
            self.text[layer] = self.cache.base.with_room(layer, self.width - self.end)
        if self.steps != self.cache.steps:
            self.steps, self.rows = self.cache.steps, None
            self.new = slice(self.steps, self.steps + key.shape[2] // self.num_anchors)
            columns = torch.arange(self.end, self.width).view(self.num_anchors, self.max_steps)
            self.columns = columns[:, self.new].flatten()
        for states, new in zip(self.text[layer], (key, value), strict=True):
            states.index_copy_(2, self.columns, new)
        return self.text[layer]

    def mask(self, query: Tensor, key: Tensor) -> Tensor:
        """0 for the keys that rows of ``query`` [B, Hq, rows, D] see, else −inf: [B, 1, Hq / Hkv · rows, end + P·T]."""
        if self.rows is None:
            base_row, groups = query.shape[2] > key.shape[2], query.shape[1] // key.shape[1]
            self.rows = self._shared_rows(base_row, groups, query) if self._ends_the_text() else None
            if self.rows is None:
                self.rows = self._rows(self.cache.anchors.expand(len(key), -1), self.end, base_row, groups, query)
        return self.rows

    def _ends_the_text(self) -> bool:
        """Whether there is one thought, behind the last key of texts without padding."""
        cache = self.cache
        if self.num_anchors > 1 or cache.key_start is not None or cache.base.mask is not None:
            return False
        return int(cache.anchors.min()) == self.end - 1

    def _shared_rows(self, base_row: bool, groups: int, like: Tensor) -> Tensor:
        """The mask where it depends only on the distance from the end: made once, and cut to length for every token."""
        made = self.cache.states.masks
        which = self.new.start, self.new.stop, base_row, groups
        if which not in made or made[which].shape[-1] < self.width:
            end = self.end + _MASKED_AHEAD
            made[which] = self._rows(torch.tensor([[end - 1]]), end, base_row, groups, like)
        return made[which][..., -self.width :]

    def _rows(self, anchors: Tensor, end: int, base_row: bool, groups: int, like: Tensor) -> Tensor:
        """The mask of the new steps behind ``anchors`` [B, P], in front of them a row of the base pass or none."""
        anchors, column = anchors[:, :, None, None], torch.arange(end)
        steps = torch.arange(self.max_steps)
        new = steps[self.new, None]
        visible, own = column <= anchors, steps <= new
        if self.window is not None:
            visible = visible & (anchors + 1 + new - column < self.window)
            own = own & (new - steps < self.window)
        if self.cache.key_start is not None:
            visible = visible & (column >= self.cache.key_start.view(len(anchors), -1, 1, 1))
        own = torch.eye(self.num_anchors, dtype=torch.bool)[:, None, :, None] & own[:, None]
        shape = *anchors.shape[:2], len(new), -1
        visible = torch.cat([visible.expand(shape), own.flatten(2).expand(shape)], dim=-1).flatten(1, 2)
        if base_row:
            seen = self.cache.base.mask
            base = visible.new_zeros(len(visible), 1, visible.shape[2])
            base[:, :, :end] = True if seen is None else seen[:, 0]
            visible = torch.cat([base, visible], dim=1)
        mask = like.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        return mask.repeat(1, groups, 1)[:, None]
