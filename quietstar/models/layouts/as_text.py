"""A few thoughts laid out as text, for one library call per layer (generation on a CPU)."""

import torch
from torch import Tensor

from quietstar.models.layouts.attention import Layer
from quietstar.models.layouts.text import BaseStates, TextCache

# Masks are created for texts longer than the present one by this many tokens, so that they serve many tokens.
_MASKED_AHEAD = 256


class ThoughtsAsText:
    """Thoughts laid out as text after the base keys, with room for all steps; keys of future steps are masked.

    Created once per thought and window size. The mask of a pass is created once for all its layers of that window.

    Args:
        base: the base pass.
        layer: any layer with that window.
        anchors, key_start: those of ``ThoughtCache``, but as indices into the base keys of the layer.
        max_steps: T at the end of the thought.
        masks: cache of masks, shared with earlier and later thoughts.
    """

    def __init__(
        self,
        base: BaseStates | TextCache,
        layer: Layer,
        anchors: Tensor,
        key_start: Tensor | None,
        max_steps: int,
        masks: dict[tuple, Tensor],
    ):
        self.base, self.layer, self.window, self.masks = base, layer.index, layer.window, masks
        self.anchors, self.key_start = anchors, key_start
        self.num_anchors, self.max_steps, self.steps = anchors.shape[-1], max_steps, -1
        self.end = base.seen(layer.index)[0].shape[2]
        self.width = self.end + self.num_anchors * max_steps
        self.own_columns = torch.arange(self.end, self.width).view(self.num_anchors, max_steps)
        self.kept: Tensor | None = None  # int64 [B, P'], which of the thoughts continue; None means all
        self.text: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, steps: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Insert a layer's new keys and values [B, Hkv, P·S, D] after ``steps``; returns all [B, Hkv, end + P·T, D]."""
        if layer not in self.text:
            self.text[layer] = self.base.with_room(layer, self.width - self.end)
        if self.steps != steps:
            self.steps, self.rows = steps, None
            self.new = slice(steps, steps + key.shape[2] // self.anchors.shape[-1])
            columns = self.own_columns[:, self.new]
            self.columns = columns.flatten() if self.kept is None else columns[self.kept].flatten(1)
        for states, new in zip(self.text[layer], (key, value), strict=True):
            if self.kept is None:
                states.index_copy_(2, self.columns, new)
            else:
                states.scatter_(2, self.columns[:, None, :, None].expand_as(new), new)
        return self.text[layer]

    def keep(self, chosen: Tensor, needed: Tensor) -> None:
        """See ``ThoughtCache``. Keys and values of the other thoughts stay in place but are not seen."""
        self.kept = chosen if self.kept is None else self.kept.gather(1, chosen)
        self.anchors = self.anchors.gather(1, chosen).masked_fill(~needed, -1)
        if self.key_start is not None and self.key_start.dim() == 2:
            self.key_start = self.key_start.gather(1, chosen)
        self.steps = -1

    def mask(self, query: Tensor, key: Tensor) -> Tensor:
        """Return a mask [B, 1, Hq / Hkv · rows, end + P·T]: 0 where ``query`` [B, Hq, rows, D] sees keys, else −inf."""
        if self.rows is None:
            base_row, groups = query.shape[2] > key.shape[2], query.shape[1] // key.shape[1]
            self.rows = self._shared_rows(base_row, groups, query) if self._ends_the_text() else None
            if self.rows is None:
                self.rows = self._rows(self.anchors.expand(len(key), -1), self.end, base_row, groups, query)
        return self.rows

    def _base_mask(self) -> Tensor | None:
        return self.base.mask(self.layer, self.window)

    def _ends_the_text(self) -> bool:
        """Whether there is a single thought per text, after its last key, and no padding."""
        if self.num_anchors > 1 or self.key_start is not None or self._base_mask() is not None:
            return False
        return int(self.anchors.min()) == self.end - 1

    def _shared_rows(self, base_row: bool, groups: int, like: Tensor) -> Tensor:
        """Return a mask that depends only on the distance from the end: created once, and cut to length per token."""
        which = self.window, self.new.start, self.new.stop, base_row, groups
        if which not in self.masks or self.masks[which].shape[-1] < self.width:
            end = self.end + _MASKED_AHEAD
            self.masks[which] = self._rows(torch.tensor([[end - 1]]), end, base_row, groups, like)
        return self.masks[which][..., -self.width :]

    def _rows(self, anchors: Tensor, end: int, base_row: bool, groups: int, like: Tensor) -> Tensor:
        """Return the mask of the new steps after ``anchors`` [B, P], preceded by a row of the base pass or none."""
        anchors, column = anchors[:, :, None, None], torch.arange(end)
        steps = torch.arange(self.max_steps)
        new = steps[self.new, None]
        visible, own = column <= anchors, steps <= new
        if self.window is not None:
            visible = visible & (anchors + 1 + new - column < self.window)
            own = own & (new - steps < self.window)
        if self.key_start is not None:
            visible = visible & (column >= self.key_start.view(len(anchors), -1, 1, 1))
        places = torch.arange(self.num_anchors)
        same = (places if self.kept is None else self.kept)[..., None] == places  # [P, P] or [B, P', P]
        own = same[..., :, None, :, None] & own[:, None]
        shape = *anchors.shape[:2], len(new), -1
        visible = torch.cat([visible.expand(shape), own.flatten(-2).expand(shape)], dim=-1).flatten(1, 2)
        if base_row:
            seen = self._base_mask()
            base = visible.new_zeros(len(visible), 1, visible.shape[2])
            base[:, :, :end] = True if seen is None else seen[:, 0]
            visible = torch.cat([base, visible], dim=1)
        mask = like.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        return mask.repeat(1, groups, 1)[:, None]
