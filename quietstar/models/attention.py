"""Where transformers' attention layers meet thought attention.

Every layer of a Quiet-STaR model calls :func:`quietstar_attention`. Without a ``thoughts`` argument it is ordinary
SDPA; with one, that object says which rows are base text and which are thought steps:

- :class:`BaseStates`: a base pass whose keys and values are kept for the thoughts that follow;
- :class:`TextCache`: base passes over texts that grow each at its own pace (generation with drafts);
- :class:`ThoughtCache`: steps of thoughts on kept base states (inference, sampling);
- :class:`BaseAndThoughts`: a base pass and the first steps of the thoughts behind it at once;
- :class:`ThoughtTree`: base text and all thought steps in one sequence (training).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from quietstar.models.cache import GrowingLayer
from quietstar.models.documents import first_key
from quietstar.models.other_trainers import check_thinks
from quietstar.models.thoughts_as_text import ThoughtsAsText
from quietstar.models.transformers_names import sdpa_attention_forward, sdpa_mask
from quietstar.ops import thought_attention

ATTENTION_NAME = "quietstar"

_TEXT_KEYS = 256  # the most keys of thoughts that ``generate`` attends to as if they were text, on a CPU


def quietstar_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    thoughts: "BaseStates | TextCache | ThoughtCache | BaseAndThoughts | ThoughtTree | None" = None,
    **options,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers: [B, H, rows, D] in, [B, rows, Hq, D] out."""
    if thoughts is None:
        check_thinks(module, query)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return thoughts.attend(module, query, key, value, attention_mask, **options), None


AttentionInterface.register(ATTENTION_NAME, quietstar_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


class BaseStates:
    """The base keys and values each layer attended to in a base pass, whatever the kind of cache.

    ``keys[layer]`` and ``values[layer]`` are [B, Hkv, L, D], cached tokens first.

    Args:
        mask: bool [B, 1, rows, L], the keys each row sees; None is plain causal.
        cache: transformers' cache, which the new keys and values go to; None without.
    """

    def __init__(self, mask: Tensor | None, cache: Cache | None = None) -> None:
        self.mask, self.cache = mask, cache
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def attend(self, module, query, key, value, _mask, **options) -> Tensor:
        seen = self.keep(module.layer_idx, key, value)
        return sdpa_attention_forward(module, query, *seen, self.mask, **options)[0]

    @property
    def end(self) -> int:
        """How many keys a pass sees."""
        return self.keys[0].shape[2]

    def keep(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new keys and values of a layer; all that the pass sees."""
        if self.cache is not None:
            key, value = self.cache.update(key, value, layer)
        self.keys[layer], self.values[layer] = key, value
        return key, value

    def with_room(self, layer: int, steps: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [B, Hkv, L + steps, D], the last of them to be written to."""
        if self.cache is not None and isinstance(self.cache.layers[layer], GrowingLayer):
            return self.cache.layers[layer].with_room(steps)
        return tuple(_padded(states[layer], steps) for states in (self.keys, self.values))


class TextCache:
    """Base keys and values of texts that grow each at its own pace, and may be cut back.

    ``keys[layer]`` and ``values[layer]`` are [B, Hkv, capacity, D] (thoughts laid out as text make room for themselves
    behind that); key j of row b belongs to column j of that row's text. What lies behind the end of a text is never
    looked at: to cut a text back is to forget its end.

    Args:
        capacity: columns of the longest text.
        key_start: int64 [B], first column that is not left padding; None if there is none.
        window: sliding window in tokens, or None.
    """

    def __init__(self, capacity: int, key_start: Tensor | None, window: int | None):
        self.capacity, self.key_start, self.window = capacity, key_start, window
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def extend(self, columns: Tensor, end: int, mask: Tensor | None) -> "TextCache":
        """Prepare a pass over new tokens.

        Args:
            columns: int64 [B, S], where the tokens stand.
            end: host copy of the largest column + 1: no later key is read.
            mask: bool [B, 1, S, end], the keys each token sees; None is plain causal.
        """
        self._columns, self.end, self.mask = columns, end, mask
        self._row = torch.arange(len(columns), device=columns.device)[:, None]
        return self

    def visible(self, columns: Tensor, end: int) -> Tensor:
        """The mask of single tokens at ``columns`` [B, 1], bool [B, 1, 1, end]."""
        column = torch.arange(end, device=columns.device)
        visible = column <= columns
        if self.key_start is not None:
            visible &= column >= self.key_start[:, None]
        if self.window is not None:
            visible &= columns - column < self.window
        return visible[:, None, None]

    def attend(self, module, query, key, value, _mask, **options) -> Tensor:
        seen = self.keep(module.layer_idx, key, value)
        return sdpa_attention_forward(module, query, *seen, self.mask, **options)[0]

    def keep(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new keys and values of a layer; all that the pass sees."""
        if layer not in self.keys:
            shape = *key.shape[:2], self.capacity, key.shape[-1]
            # Zeros: attention libraries multiply masked values by a probability of 0, and 0 · NaN is NaN.
            self.keys[layer], self.values[layer] = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self.keys[layer], self.values[layer]
        keys[self._row, :, self._columns] = key.transpose(1, 2)
        values[self._row, :, self._columns] = value.transpose(1, 2)
        return keys[:, :, : self.end], values[:, :, : self.end]

    def with_room(self, layer: int, steps: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that a pass sees and ``steps`` behind them, to be written to until texts grow."""
        for states in (self.keys, self.values):
            if states[layer].shape[2] < self.end + steps:
                states[layer] = _padded(states[layer], steps)
        return tuple(states[layer][:, :, : self.end + steps] for states in (self.keys, self.values))


def _padded(states: Tensor, steps: int) -> Tensor:
    """Keys or values [B, Hkv, L, D] and room for ``steps`` more."""
    # Zeros: attention libraries multiply masked values by a probability of 0, and 0 · NaN is NaN.
    return F.pad(states, (0, 0, 0, steps))


class ThoughtStates:
    """What one thought leaves to the next in ``generate``: room for keys and values, masks, and where the texts begin.

    The room is allocated at the first thought and reused by all that follow.

    Args:
        max_anchors: thoughts per sequence that there will be at most; more of them make the room anew.
    """

    def __init__(self, max_anchors: int = 1) -> None:
        self.max_anchors = max_anchors
        self.masks: dict[tuple, Tensor] = {}  # of ``ThoughtsAsText``
        self._room: dict[int, tuple[Tensor, Tensor]] = {}
        self._first_key: tuple[Tensor | None] | None = None

    def first_key(self, attention_mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
        """``documents.first_key``; a mask [B, L] is looked at once, since texts only grow at their end."""
        if attention_mask is not None and attention_mask.dim() == 4:
            return first_key(attention_mask, shape)
        if self._first_key is None:
            self._first_key = (first_key(attention_mask, shape),)
        return self._first_key[0]

    def of_layer(self, layer: int, key: Tensor, num_anchors: int, max_steps: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, P, max_steps, D] of a layer, for new keys [B, Hkv, ..., D]."""
        room = self._room.get(layer)
        wanted = *key.shape[:2], max(num_anchors, self.max_anchors), max_steps, key.shape[-1]
        if room is None or room[0].shape != wanted:
            room = self._room[layer] = _new_room(key, wanted)
        return room[0][:, :, :num_anchors], room[1][:, :, :num_anchors]


def _new_room(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    room = like.new_empty(shape), like.new_empty(shape)
    if not torch.compiler.is_compiling():
        for states in room:
            torch._dynamo.mark_static_address(states)  # CUDA graphs write into it
    return room


class ThoughtCache:
    """Thoughts growing step by step behind anchors in a finished base pass.

    Args:
        base: the base pass.
        anchors: int [B, P] or [P], indices into the base keys; −1 is inactive.
        max_steps: T at the end of the thought.
        key_start: int [B] or [B, P], first base key of each anchor's text; None if it is 0 for all.
        states: room for the thought keys and values, of earlier thoughts; default new.
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
        self.states = ThoughtStates() if states is None else states
        self._as_text: ThoughtsAsText | None = None
        self._differentiable = torch.is_grad_enabled()
        self._grown: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, module, query, key, value, _mask, *, scaling, sliding_window=None, **_) -> Tensor:
        """Rows are anchor-major: P anchors of S new steps each."""
        layer = module.layer_idx
        num_anchors = self.anchors.shape[-1]
        if self.is_text(query):
            return self.attend_as_text(layer, query, key, value, scaling, sliding_window)
        query, key, value = (x.unflatten(2, (num_anchors, -1)) for x in (query, key, value))
        thought_key, thought_value = self._append(layer, key, value)
        output = thought_attention(
            query,
            self.base.keys[layer],
            self.base.values[layer],
            thought_key,
            thought_value,
            anchors=self.anchors,
            key_start=self.key_start,
            window=sliding_window,
            window_from="step",
            scale=scaling,
        )
        return output.flatten(2, 3).transpose(1, 2)

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All thought keys and values [B, Hkv, P, steps, D] of a layer, the new ones behind those there are."""
        if self._differentiable:  # what autograd has saved must not be written to
            if layer in self._grown:
                key, value = (torch.cat(pair, dim=3) for pair in zip(self._grown[layer], (key, value), strict=True))
            self._grown[layer] = key, value
            return key, value
        total = self.steps + key.shape[3]
        room = self.states.of_layer(layer, key, key.shape[2], self.max_steps)
        for states, new in zip(room, (key, value), strict=True):
            states[:, :, :, self.steps : total] = new
        return tuple(states[:, :, :, :total] for states in room)

    def is_text(self, query: Tensor) -> bool:
        """Whether ``generate`` has so few thoughts that they are text: on a CPU calls cost more than masked keys.

        One library call on the base keys and the keys of all thoughts is then several times as fast as the op.
        """
        num_anchors = self.anchors.shape[-1]
        few = num_anchors == 1 or (self._generates and num_anchors * self.max_steps <= _TEXT_KEYS)
        on_cpu = query.device.type == "cpu" and not torch.compiler.is_compiling()
        return few and on_cpu and not self._differentiable

    def attend_as_text(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Rows of ``query`` as in ``attend``, and in front of them one row of the base pass or none."""
        if self._as_text is None:
            self._as_text = ThoughtsAsText(self, window)
        text_key, text_value = self._as_text.extend(layer, key, value)
        # The heads of a group are rows of one head: keys and values need not be repeated.
        packed = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
        output = F.scaled_dot_product_attention(
            packed, text_key, text_value, attn_mask=self._as_text.mask(query, key), scale=scaling
        )
        return output.reshape(query.shape).transpose(1, 2)


class BaseAndThoughts:
    """The rows of a base pass and behind them the first steps of the thoughts, which see its keys and values."""

    def __init__(self, base: BaseStates | TextCache, base_rows: int, thoughts: ThoughtCache):
        self.base, self.base_rows, self.thoughts = base, base_rows, thoughts

    def attend(self, module, query, key, value, _mask, *, scaling, sliding_window=None, **options) -> Tensor:
        rows = [self.base_rows, query.shape[2] - self.base_rows]
        (base_key, key), (base_value, value) = (x.split(rows, dim=2) for x in (key, value))
        if self.base_rows == 1 and self.thoughts.is_text(query):
            self.base.keep(module.layer_idx, base_key, base_value)
            return self.thoughts.attend_as_text(module.layer_idx, query, key, value, scaling, sliding_window)
        options = {"scaling": scaling, "sliding_window": sliding_window} | options
        base_query, query = query.split(rows, dim=2)
        base_output = self.base.attend(module, base_query, base_key, base_value, None, **options)
        return torch.cat([base_output, self.thoughts.attend(module, query, key, value, None, **options)], dim=1)


class ThoughtTree:
    """Base text (rows 0..L−1) and behind it P anchors of S steps each, anchor-major, in one sequence.

    Args:
        base_length: L.
        anchors: int [P] or [B, P], base positions.
        base_mask: mask of the base rows for SDPA, [B, 1, L, L]; None is plain causal.
        key_start: int [B] or [B, P], first base key of each anchor's text; None if it is 0 for all.
    """

    def __init__(
        self, base_length: int, anchors: Tensor, base_mask: Tensor | None = None, key_start: Tensor | None = None
    ):
        self.base_length, self.anchors, self.base_mask, self.key_start = base_length, anchors, base_mask, key_start

    def attend(self, module, query, key, value, _mask, *, scaling, sliding_window=None, **options) -> Tensor:
        rows = [self.base_length, query.shape[2] - self.base_length]
        base, thought = zip(*(x.split(rows, dim=2) for x in (query, key, value)), strict=True)
        base_output, _ = sdpa_attention_forward(module, *base, self.base_mask, scaling=scaling, **options)
        thought_query, thought_key, thought_value = (x.unflatten(2, (self.anchors.shape[-1], -1)) for x in thought)
        thought_output = thought_attention(
            thought_query,
            *base[1:],
            thought_key,
            thought_value,
            anchors=self.anchors,
            key_start=self.key_start,
            window=sliding_window,
            window_from="step",
            scale=scaling,
        )
        return torch.cat([base_output, thought_output.flatten(2, 3).transpose(1, 2)], dim=1)
