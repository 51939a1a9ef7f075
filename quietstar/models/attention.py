"""Where transformers' attention layers meet thought attention.

Every layer of a Quiet-STaR model calls :func:`quietstar_attention`. Without a ``thoughts`` argument it is ordinary
SDPA; with one, that object says which rows are base text and which are thought steps:

- :class:`BaseStates`: a base pass whose keys and values are kept for the thoughts that follow;
- :class:`TextCache`: base passes over texts that grow each at its own pace (generation with drafts);
- :class:`ThoughtCache`: steps of thoughts on kept base states (inference, sampling);
- :class:`ThoughtTree`: base text and all thought steps in one sequence (training).
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quietstar.ops import thought_attention

ATTENTION_NAME = "quietstar"


def quietstar_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    thoughts: "BaseStates | ThoughtCache | ThoughtTree | None" = None,
    **options,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers: [B, H, rows, D] in, [B, rows, Hq, D] out."""
    if thoughts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return thoughts.attend(module, query, key, value, attention_mask, **options), None


AttentionInterface.register(ATTENTION_NAME, quietstar_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


class BaseStates:
    """The base keys and values each layer attended to in a base pass, whatever the kind of cache.

    ``keys[layer]`` and ``values[layer]`` are [B, Hkv, L, D], cached tokens first.
    """

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def attend(self, module, query, key, value, attention_mask, **options) -> Tensor:
        self.keys[module.layer_idx], self.values[module.layer_idx] = key, value
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]


class TextCache:
    """Base keys and values of texts that grow each at its own pace, and may be cut back.

    ``keys[layer]`` and ``values[layer]`` are [B, Hkv, capacity, D], allocated once; key j of row b belongs to column j
    of that row's text. What lies behind the end of a text is never looked at: to cut a text back is to forget its end.

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
        self._columns, self._end, self._mask = columns, end, mask
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
        layer = module.layer_idx
        if layer not in self.keys:
            shape = *key.shape[:2], self.capacity, key.shape[-1]
            # Zeros: attention libraries multiply masked values by a probability of 0, and 0 · NaN is NaN.
            self.keys[layer], self.values[layer] = key.new_zeros(shape), value.new_zeros(shape)
        row = torch.arange(key.shape[0], device=key.device)[:, None]
        seen = []
        for states, new in ((self.keys[layer], key), (self.values[layer], value)):
            states[row, :, self._columns] = new.transpose(1, 2)
            seen.append(states[:, :, : self._end])
        return sdpa_attention_forward(module, query, *seen, self._mask, **options)[0]


class ThoughtStates:
    """Room for the keys and values of thoughts, allocated at the first thought and reused by all that follow.

    Args:
        max_anchors: thoughts per sequence that there will be at most; more of them make the room anew.
    """

    def __init__(self, max_anchors: int = 1) -> None:
        self.max_anchors = max_anchors
        self._room: dict[int, tuple[Tensor, Tensor]] = {}

    def of_layer(self, layer: int, key: Tensor, max_steps: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, P, max_steps, D] of a layer, for new keys [B, Hkv, P, S, D]."""
        batch, heads, num_anchors, _, head_size = key.shape
        room = self._room.get(layer)
        wanted = batch, heads, max(num_anchors, self.max_anchors), max_steps, head_size
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
        key_start: int [B], first base key that is not left padding; None if there is none.
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
        self._states = ThoughtStates() if states is None else states
        self._text_mask: tuple[tuple[int, int], int, Tensor | None] | None = None

    def attend(self, module, query, key, value, _mask, *, scaling, sliding_window=None, **_) -> Tensor:
        """Rows are anchor-major: P anchors of S new steps each."""
        layer = module.layer_idx
        num_anchors = self.anchors.shape[-1]
        query, key, value = (x.unflatten(2, (num_anchors, -1)) for x in (query, key, value))
        total = self.steps + query.shape[3]
        thought_key, thought_value = (x[:, :, :, :total] for x in self._states.of_layer(layer, key, self.max_steps))
        thought_key[:, :, :, self.steps :] = key
        thought_value[:, :, :, self.steps :] = value
        base_key, base_value = self.base.keys[layer], self.base.values[layer]
        if num_anchors == 1 and query.device.type == "cpu" and not torch.compiler.is_compiling():
            end, mask = self._as_text(query.shape[3], total, sliding_window)
            key = torch.cat([base_key[:, :, :end], thought_key[:, :, 0]], dim=2)
            value = torch.cat([base_value[:, :, :end], thought_value[:, :, 0]], dim=2)
            return sdpa_attention_forward(module, query[:, :, 0], key, value, mask, scaling=scaling)[0]
        output = thought_attention(
            query,
            base_key,
            base_value,
            thought_key,
            thought_value,
            anchors=self.anchors,
            key_start=self.key_start,
            window=sliding_window,
            scale=scaling,
        )
        return output.flatten(2, 3).transpose(1, 2)

    def _as_text(self, steps: int, total: int, window: int | None) -> tuple[int, Tensor | None]:
        """Layout of a single thought per row as text that goes on behind its anchor; made once for all layers.

        On a CPU, where calls cost more than copies, one library call on such text is several times as fast as the op.

        Returns:
            How many base keys are looked at; and which of them and of the ``total`` thought keys each of the new
            ``steps`` sees, bool [B, 1, S, end + total], or None for all.
        """
        if self._text_mask is None or self._text_mask[0] != (steps, total):
            anchors = self.anchors.expand(len(self.base.keys[0]), 1)
            end = int(anchors.max()) + 1
            column = torch.arange(end, device=anchors.device)
            visible = column <= anchors
            if window is not None:
                visible &= anchors - column < window
            if self.key_start is not None:
                visible &= column >= self.key_start[:, None]
            own = torch.ones(steps, total, dtype=torch.bool, device=anchors.device).tril(total - steps)
            mask = None
            if steps > 1 or not visible.all():
                shape = len(anchors), 1, steps, -1
                mask = torch.cat([visible[:, None, None].expand(shape), own.expand(shape)], dim=-1)
            self._text_mask = (steps, total), end, mask
        return self._text_mask[1:]


class ThoughtTree:
    """Base text (rows 0..L−1) and behind it P anchors of S steps each, anchor-major, in one sequence.

    Args:
        base_length: L.
        anchors: int [P], base positions.
        base_mask: mask of the base rows for SDPA, [B, 1, L, L]; None is plain causal.
        key_start: int [B], first base key that is not left padding; None if there is none.
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
            scale=scaling,
        )
        return torch.cat([base_output, thought_output.flatten(2, 3).transpose(1, 2)], dim=1)
