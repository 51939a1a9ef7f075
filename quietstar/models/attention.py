"""Where transformers' attention layers meet thought attention.

Every layer of a Quiet-STaR model calls :func:`quietstar_attention`. Without a ``thoughts`` argument it is ordinary
SDPA; with one, that object says which rows are base text and which are thought steps:

- :class:`BaseStates`: a base pass whose keys and values are kept for the thoughts that follow;
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


class ThoughtCache:
    """Thoughts growing step by step behind anchors in a finished base pass.

    Thought keys and values are preallocated for ``max_steps`` steps: [B, Hkv, P, max_steps, D] per layer.

    Args:
        base: the base pass.
        anchors: int [B, P] or [P], indices into the base keys; −1 is inactive.
        max_steps: T at the end of the thought.
        key_start: int [B], first base key that is not left padding; None if there is none.
    """

    def __init__(self, base: BaseStates, anchors: Tensor, max_steps: int, key_start: Tensor | None = None):
        self.base, self.anchors, self.key_start = base, anchors, key_start
        self.steps = 0
        self._keys, self._values = (
            {layer: x.new_empty(*x.shape[:2], anchors.shape[-1], max_steps, x.shape[-1]) for layer, x in states.items()}
            for states in (base.keys, base.values)
        )

    def attend(self, module, query, key, value, _mask, *, scaling, sliding_window=None, **_) -> Tensor:
        """Rows are anchor-major: P anchors of S new steps each."""
        layer = module.layer_idx
        num_anchors = self.anchors.shape[-1]
        query, key, value = (x.unflatten(2, (num_anchors, -1)) for x in (query, key, value))
        total = self.steps + query.shape[3]
        thought_key, thought_value = (x[layer][:, :, :, :total] for x in (self._keys, self._values))
        thought_key[:, :, :, self.steps :] = key
        thought_value[:, :, :, self.steps :] = value
        output = thought_attention(
            query,
            self.base.keys[layer],
            self.base.values[layer],
            thought_key,
            thought_value,
            anchors=self.anchors,
            key_start=self.key_start,
            window=sliding_window,
            scale=scaling,
        )
        return output.flatten(2, 3).transpose(1, 2)


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
