"""Rows of thoughts: steps after anchors, in passes of their own, in the base pass, or all in one sequence."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quietstar.models.documents import first_key
from quietstar.models.layouts.as_text import ThoughtsAsText
from quietstar.models.layouts.attention import Layer
from quietstar.models.layouts.text import BaseStates, TextCache, TextRows

_TEXT_KEYS = 256  # up to this many keys of thoughts are laid out as text by ``generate`` on a CPU


class ThoughtStates:
    """State kept from one thought to the next in ``generate``: memory for keys and values, masks, starts of texts.

    The memory is allocated for the first thought and reused by all that follow.

    Args:
        max_anchors: the largest number of thoughts per sequence; with more, the memory is reallocated.
    """

    def __init__(self, max_anchors: int = 1) -> None:
        self.max_anchors = max_anchors
        self.masks: dict[tuple, Tensor] = {}  # those of ``ThoughtsAsText``
        self.parts: Any = None  # parts of the model, the same for all thoughts
        self._room: dict[int, tuple[Tensor, Tensor]] = {}
        self._first_key: tuple[Tensor | None] | None = None

    def first_key(self, attention_mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
        """Cache ``documents.first_key``: a mask [B, L] is read only once, since texts only grow at their end."""
        if attention_mask is not None and attention_mask.dim() == 1:
            return attention_mask
        if self._first_key is None:
            self._first_key = (first_key(attention_mask, shape),)
        return self._first_key[0]

    def of_layer(self, layer: int, key: Tensor, value: Tensor, max_steps: int) -> tuple[Tensor, Tensor]:
        """Return memory [B, Hkv, P, max_steps, D] for a layer's keys and values, given new ones [B, Hkv, P, S, D]."""
        room = self._room.get(layer)
        batch, heads, num_anchors, _, size = key.shape
        wanted = batch, heads, max(num_anchors, self.max_anchors), max_steps, size
        if room is None or room[0].shape != (*wanted[:2], max(room[0].shape[2], wanted[2]), *wanted[3:]):
            room = self._room[layer] = _new_room(key, wanted, value.shape[-1])
        return room[0][:, :, :num_anchors], room[1][:, :, :num_anchors]

    def keep(self, layer: int, chosen: Tensor, steps: int) -> None:
        """Move the first ``steps`` keys and values of the ``chosen`` anchors, int64 [B, P], to the front."""
        for states in self._room[layer]:
            states[:, :, : chosen.shape[1], :steps] = of_anchors(states[:, :, :, :steps], chosen)


def _new_room(like: Tensor, shape: tuple[int, ...], value_size: int) -> tuple[Tensor, Tensor]:
    room = like.new_empty(shape), like.new_empty(*shape[:-1], value_size)
    if not torch.compiler.is_compiling():
        for states in room:
            torch._dynamo.mark_static_address(states)  # CUDA graphs write into it
    return room


def of_anchors(states: Tensor, chosen: Tensor) -> Tensor:
    """Select ``states`` [B, Hkv, P, S, D] of the ``chosen`` anchors, int64 [B, P']."""
    return states.gather(2, chosen[:, None, :, None, None].expand(-1, states.shape[1], -1, *states.shape[3:]))


class ThoughtCache:
    """Thoughts that grow step by step after anchors of a finished base pass.

    Args:
        base: the base pass.
        anchors: int [B, P] or [P], columns of the text; −1 is inactive.
        max_steps: T at the end of the thought.
        key_start: int [B] or [B, P], first column of each anchor's text; None if it is 0 for all.
        states: memory for keys and values, reused from earlier thoughts. Default: new.
    """

    def __init__(
        self,
        base: BaseStates | TextCache,
        anchors: Tensor,
        max_steps: int,
        key_start: Tensor | None = None,
        states: ThoughtStates | None = None,
    ):
        self.base, self.anchors, self.max_steps, self.key_start = base, anchors, max_steps, key_start
        self.steps = 0
        self._generates = states is not None
        self._states = ThoughtStates() if states is None else states
        self._as_text: dict[int | None, ThoughtsAsText] = {}  # by window, like the next
        self._base_keys: dict[int | None, tuple[Tensor, Tensor | None]] = {}
        self._differentiable = torch.is_grad_enabled()
        self._grown: dict[int, tuple[Tensor, Tensor]] = {}
        num_anchors = anchors.shape[-1]
        self._in_room: set[int] = set()  # layers whose keys and values are in the memory of the states
        self._few = num_anchors == 1 or (self._generates and num_anchors * max_steps <= _TEXT_KEYS)

    def keep(self, chosen: Tensor, needed: Tensor) -> None:
        """Continue with only some of the thoughts.

        Args:
            chosen: int64 [B, P'], indices of these thoughts among the anchors so far.
            needed: bool [B, P'], which of them are used; the others only pad rows that have fewer.
        """
        self.anchors = self.anchors.gather(1, chosen).masked_fill(~needed, -1)
        if self.key_start is not None and self.key_start.dim() == 2:
            self.key_start = self.key_start.gather(1, chosen)
        self._base_keys.clear()
        for layer in self._in_room:
            self._states.keep(layer, chosen, self.steps)
        self._grown = {
            layer: tuple(of_anchors(states, chosen) for states in grown) for layer, grown in self._grown.items()
        }
        for as_text in self._as_text.values():
            as_text.keep(chosen, needed)

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute attention of rows in anchor-major order: P anchors with S new steps each."""
        if self.is_text(layer, query):
            return self.attend_as_text(layer, query, key, value)
        query, key, value = (x.unflatten(2, (self.anchors.shape[-1], -1)) for x in (query, key, value))
        thought_key, thought_value = self._append(layer.index, key, value)
        base = self.base.seen(layer.index)
        return layer.think(query, base, thought_key, thought_value, *self._in_base_keys(layer))

    def _in_base_keys(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        """Return anchors and ``key_start`` as indices into a layer's base keys, which depend only on its window."""
        if layer.window not in self._base_keys:
            first, anchors, key_start = self.base.first(layer.index), self.anchors, self.key_start
            if first:
                anchors = torch.where(anchors < 0, -1, anchors - first)
                key_start = None if key_start is None else (key_start - first).clamp_min(0)
            self._base_keys[layer.window] = anchors, key_start
        return self._base_keys[layer.window]

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new thought keys and values of a layer, and return all of them, [B, Hkv, P, steps, D]."""
        if self._differentiable:  # tensors saved by autograd must not be overwritten
            if layer in self._grown:
                key, value = (torch.cat(pair, dim=3) for pair in zip(self._grown[layer], (key, value), strict=True))
            self._grown[layer] = key, value
            return key, value
        total = self.steps + key.shape[3]
        self._in_room.add(layer)
        room = self._states.of_layer(layer, key, value, self.max_steps)
        for states, new in zip(room, (key, value), strict=True):
            states[:, :, :, self.steps : total] = new
        return tuple(states[:, :, :, :total] for states in room)

    def is_text(self, layer: Layer, query: Tensor) -> bool:
        """Whether to lay out thoughts as text, as for a few thoughts in ``generate`` on a CPU.

        There, calls cost more than masked keys: one library call on the base keys and the keys of all thoughts is
        several times as fast as the op.
        """
        on_cpu = query.device.type == "cpu" and not torch.compiler.is_compiling()
        return self._few and on_cpu and not self._differentiable and layer.softcap is None

    def attend_as_text(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Like ``attend``, but one row of the base pass may precede the rows of thoughts."""
        as_text = self._as_text.get(layer.window)
        if as_text is None:
            as_text = self._as_text[layer.window] = ThoughtsAsText(
                self.base, layer, *self._in_base_keys(layer), self.max_steps, self._states.masks
            )
        text_key, text_value = as_text.extend(layer.index, self.steps, key, value)
        # The heads of a group become rows of one head, so keys and values need not be repeated.
        packed = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
        output = F.scaled_dot_product_attention(
            packed, text_key, text_value, attn_mask=as_text.mask(query, key), scale=layer.scale
        )
        return output.reshape(*query.shape[:3], -1).transpose(1, 2)


class BaseAndThoughts:
    """The rows of a base pass, followed by the first steps of the thoughts, which see its keys and values."""

    def __init__(self, base: BaseStates | TextCache, base_rows: int, thoughts: ThoughtCache):
        self.base, self.base_rows, self.thoughts = base, base_rows, thoughts

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = [self.base_rows, query.shape[2] - self.base_rows]
        (base_key, key), (base_value, value) = (x.split(rows, dim=2) for x in (key, value))
        if self.base_rows == 1 and self.thoughts.is_text(layer, query):
            self.base.keep(layer.index, base_key, base_value)
            return self.thoughts.attend_as_text(layer, query, key, value)
        base_query, query = query.split(rows, dim=2)
        base_output = self.base.attend(layer, base_query, base_key, base_value)
        return torch.cat([base_output, self.thoughts.attend(layer, query, key, value)], dim=1)


class ThoughtTree:
    """One sequence of the base text (rows 0..L−1) followed by P anchors with S steps each, in anchor-major order.

    Args:
        rows: rows of the text.
        anchors: int [P] or [B, P], base positions.
        key_start: int [B] or [B, P], first base key of each anchor's text; None if it is 0 for all.
        lengths: int [B, P], number of steps of each anchor that exist; None means S for all.
    """

    def __init__(
        self, rows: TextRows, anchors: Tensor, key_start: Tensor | None = None, lengths: Tensor | None = None
    ):  # fmt: skip
        self.rows, self.anchors, self.key_start, self.lengths = rows, anchors, key_start, lengths

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = self.rows.columns.shape[1]
        rows = [length, query.shape[2] - length]
        (base_query, *base), thought = zip(*(x.split(rows, dim=2) for x in (query, key, value)), strict=True)
        base_output = layer.attend(base_query, *base, self.rows.mask(length, 0, layer.window))
        query, key, value = (x.unflatten(2, (self.anchors.shape[-1], -1)) for x in thought)
        output = layer.think(query, base, key, value, self.anchors, self.key_start, self.lengths)
        return torch.cat([base_output, output], dim=1)
