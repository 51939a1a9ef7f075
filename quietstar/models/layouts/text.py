"""Rows of text: what they see, and the keys and values that they keep for thoughts."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from quietstar.models.cache import GrowingLayer
from quietstar.models.layouts.attention import Layer


class TextRows:
    """The rows of a base pass, and what each sees of the text.

    Args:
        columns: int64 [B or 1, rows], columns of the rows in their texts.
        starts: where documents begin, see ``quietstar.models.documents``; None: before all keys.
        together: whether all texts have the same length and no keys after their last row.
    """

    def __init__(self, columns: Tensor, starts: Tensor | None = None, together: bool = True):
        self.columns, self.starts, self.together = columns, starts, together
        self._masks: dict[int | None, Tensor | None] = {}  # by window, whose layers share a mask

    def mask(self, keys: int, first: int, window: int | None) -> Tensor | None:
        """Return which keys each row sees, bool [B or 1, 1, rows, keys]; None means plain causal.

        Args:
            keys: the number of keys.
            first: the first key's column in the text.
            window: the layer's window.
        """
        if window not in self._masks:
            self._masks[window] = self._mask(keys, first, window)
        return self._masks[window]

    def _mask(self, keys: int, first: int, window: int | None) -> Tensor | None:
        rows = self.columns.shape[1]
        if self.together and self.starts is None and rows in (1, keys) and (window is None or keys <= window):
            return None
        column, own = torch.arange(keys, device=self.columns.device) + first, self.columns[:, :, None]
        visible = column <= own
        if self.starts is not None:
            visible = visible & (column >= self.starts.view(len(self.starts), -1, 1))
        if window is not None:
            visible = visible & (own - column < window)
        return (visible | (column == own))[:, None]  # padding sees itself, since rows that see nothing may be NaN


class BaseStates:
    """The keys and values that each layer attended to in a base pass, with any kind of cache or none.

    ``keys[layer]`` and ``values[layer]`` are [B, Hkv, L, D], cached tokens first.

    Args:
        rows: rows of the pass.
        cache: transformers' cache, to which new keys and values are added; None if there is none.
    """

    def __init__(self, rows: TextRows, cache: Cache | None = None) -> None:
        self.rows, self.cache = rows, cache
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._first: dict[int, int] = {}

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen = self.keep(layer.index, key, value)
        return layer.attend(query, *seen, self.mask(layer.index, layer.window))

    def mask(self, layer: int, window: int | None) -> Tensor | None:
        """What the rows see in a layer, as ``TextRows.mask``."""
        return self.rows.mask(self.keys[layer].shape[2], self._first[layer], window)

    def first(self, layer: int) -> int:
        """Return the column of a layer's first key; with a sliding window, earlier keys may have been dropped."""
        return self._first[layer]

    def keep(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new keys and values of a layer; all that the pass sees."""
        self._first[layer] = 0
        if self.cache is not None:
            self._first[layer] = self.cache.get_mask_sizes(key.shape[2], layer)[1]  # before the update changes it
            key, value = self.cache.update(key, value, layer)
        self.keys[layer], self.values[layer] = key, value
        return key, value

    def seen(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer that the pass saw."""
        return self.keys[layer], self.values[layer]

    def with_room(self, layer: int, steps: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer, [B, Hkv, L + steps, D], the last ``steps`` of which may be written to."""
        if self.cache is not None and isinstance(self.cache.layers[layer], GrowingLayer):
            return self.cache.layers[layer].with_room(steps)
        return tuple(_padded(states, steps) for states in self.seen(layer))


class TextCache:
    """Base keys and values of texts that each grow at their own pace and may be cut back.

    ``keys[layer]`` and ``values[layer]`` are [B, Hkv, capacity, D] (thoughts laid out as text add room for themselves
    after that). Key j of row b belongs to column j of that row's text. Keys after the end of a text are never read, so
    cutting a text back needs no work here.

    Args:
        capacity: number of columns of the longest text.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def extend(self, rows: TextRows, end: int) -> "TextCache":
        """Prepare a pass over ``rows``; no key from ``end`` on, their largest column + 1 (a host number), is read."""
        self.rows, self.end = rows, end
        return self

    def first(self, _layer: int) -> int:
        """Return the column of the first key; nothing is dropped here."""
        return 0

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen = self.keep(layer.index, key, value)
        return layer.attend(query, *seen, self.mask(layer.index, layer.window))

    def mask(self, _layer: int, window: int | None) -> Tensor | None:
        """What the rows see in a layer, as ``TextRows.mask``."""
        return self.rows.mask(self.end, 0, window)

    def keep(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new keys and values of a layer; all that the pass sees."""
        if layer not in self.keys:
            # Zeros: attention libraries multiply masked values by a probability of 0, and 0 · NaN is NaN.
            self.keys[layer], self.values[layer] = (
                new.new_zeros(*new.shape[:2], self.capacity, new.shape[3]) for new in (key, value)
            )
        for states, new in ((self.keys[layer], key), (self.values[layer], value)):
            if self.rows.together:
                states[:, :, self.end - new.shape[2] : self.end] = new
            else:
                row = torch.arange(len(new), device=new.device)[:, None]
                states[row, :, self.rows.columns] = new.transpose(1, 2)
        return self.seen(layer)

    def seen(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer that the pass sees."""
        return self.keys[layer][:, :, : self.end], self.values[layer][:, :, : self.end]

    def with_room(self, layer: int, steps: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer, and ``steps`` more that may be written to until texts grow."""
        for states in (self.keys, self.values):
            if states[layer].shape[2] < self.end + steps:
                states[layer] = _padded(states[layer], steps)
        return tuple(states[layer][:, :, : self.end + steps] for states in (self.keys, self.values))


def _padded(states: Tensor, steps: int) -> Tensor:
    """Pad keys or values [B, Hkv, L, D] with room for ``steps`` more."""
    # Zeros: attention libraries multiply masked values by a probability of 0, and 0 · NaN is NaN.
    return F.pad(states, (0, 0, 0, steps))
