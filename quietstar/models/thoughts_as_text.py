"""Few thoughts laid out as text, for one library call per layer (generation on a CPU)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quietstar.models.attention import ThoughtCache


class ThoughtsAsText:
    """Thoughts laid out as text behind the base keys, all steps there will be; the keys of those to come are masked.

    Made once per thought; what a pass needs, once for all its layers.
    """

    def __init__(self, cache: "ThoughtCache", key: Tensor, window: int | None):
        self.cache, self.end, self.steps = cache, cache.base.end, -1
        self.text: dict[int, tuple[Tensor, Tensor]] = {}
        anchors = cache.anchors.expand(len(key), -1)[:, :, None]
        num_anchors, steps = anchors.shape[1], cache.max_steps
        # Zeros: attention libraries multiply masked values by a probability of 0, and 0 · NaN is NaN.
        self.room = key.new_zeros(*key.shape[:2], num_anchors * steps, key.shape[3])
        column = torch.arange(self.end)
        visible = column <= anchors
        if window is not None:
            visible &= anchors - column < window
        if cache.key_start is not None:
            visible &= column >= cache.key_start[:, None, None]
        own = torch.ones(steps, steps, dtype=torch.bool).tril()
        own = torch.eye(num_anchors, dtype=torch.bool)[:, None, :, None] & own[:, None]
        shape = len(anchors), num_anchors, steps, -1
        visible = torch.cat([visible[:, :, None].expand(shape), own.flatten(2).expand(shape)], dim=-1)
        self.whole_mask = _additive(visible, key)  # [B, P, T, end + P·T]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, end + P·T, D] of a layer, with the new ones [B, Hkv, P·S, D] in their places."""
        if layer not in self.text:
            base = self.cache.base.keys[layer], self.cache.base.values[layer]
            self.text[layer] = tuple(torch.cat([states[:, :, : self.end], self.room], dim=2) for states in base)
        if self.steps != self.cache.steps:
            self.steps, self.rows = self.cache.steps, None
            self.columns = torch.arange(self.end, self.whole_mask.shape[3]).view(self.whole_mask.shape[1:3])
            self.columns = self.columns[:, self._new(key)].flatten()
        for states, new in zip(self.text[layer], (key, value), strict=True):
            states.index_copy_(2, self.columns, new)
        return self.text[layer]

    def mask(self, query: Tensor, key: Tensor) -> Tensor:
        """0 for the keys that rows of ``query`` [B, Hq, rows, D] see, else −inf: [B, 1, Hq / Hkv · rows, end + P·T]."""
        if self.rows is None:
            mask = self.whole_mask[:, :, self._new(key)].flatten(1, 2)
            if query.shape[2] > key.shape[2]:
                base = mask.new_full((len(mask), 1, mask.shape[2]), -torch.inf)
                seen = self.cache.base.mask
                base[:, :, : self.end] = 0 if seen is None else _additive(seen[:, 0], mask)
                mask = torch.cat([base, mask], dim=1)
            self.rows = mask.repeat(1, query.shape[1] // key.shape[1], 1)[:, None]
        return self.rows

    def _new(self, key: Tensor) -> slice:
        """The steps of new keys [B, Hkv, P·S, D]."""
        return slice(self.steps, self.steps + key.shape[2] // self.whole_mask.shape[1])


def _additive(visible: Tensor, like: Tensor) -> Tensor:
    """0 where ``visible``, else −inf."""
    return like.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
