"""The attention function that every layer of a decoder calls, which connects transformers and thought attention."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from quietstar.models.other_trainers import check_thinks
from quietstar.models.transformers_names import sdpa_attention_forward, sdpa_mask
from quietstar.ops import thought_attention

ATTENTION_NAME = "quietstar"

# Arguments of a decoder's forward that its layers pass on to the attention function but that do not affect it.
_SAYS_NOTHING = {
    "cache_position", "output_attentions", "output_hidden_states", "position_ids", "return_dict", "use_cache",
}  # fmt: skip


class Layer(NamedTuple):
    """The parameters of a layer's attention, taken from its call."""

    module: nn.Module
    scale: float
    window: int | None  # how many tokens a token sees, including itself; None means all
    softcap: float | None

    @property
    def index(self) -> int:
        """Index of the layer in the decoder."""
        return self.module.layer_idx

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Compute attention of text: [B, H, rows, D] in, [B, rows, Hq, D] out.

        Args:
            query, key, value: rows of text, and the keys and values that they may see.
            mask: [B, 1, rows, keys], bool or to be added to the scores; None means plain causal, with rows at the end.
        """
        if self.softcap is None:
            return sdpa_attention_forward(self.module, query, key, value, mask, scaling=self.scale)[0]
        return _softcapped(query, key, value, mask, self.scale, self.softcap)

    def think(
        self, query: Tensor, base: tuple[Tensor, Tensor], key: Tensor, value: Tensor, anchors: Tensor,
        key_start: Tensor | None, lengths: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute attention of thoughts [B, H, P, S or T, D] on ``base`` keys and values [B, Hkv, L, D].

        Thoughts have ``lengths``, int [B, P]: later steps do not exist. Returns [B, P·S, Hq, D].
        """
        output = thought_attention(
            query,
            *base,
            key,
            value,
            anchors=anchors,
            key_start=key_start,
            thought_lengths=lengths,
            window=self.window,
            window_from="step",
            scale=self.scale,
            softcap=self.softcap,
        )
        return output.flatten(2, 3).transpose(1, 2)


class Layout(Protocol):
    """Defines what the rows of a pass see of each other."""

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute attention: [B, H, rows, D] in, [B, rows, Hq, D] out."""


def quietstar_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    thoughts: Layout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers: [B, H, rows, D] in, [B, rows, Hq, D] out.

    Without ``thoughts`` it computes ordinary attention.

    Raises:
        ValueError: the layer passes an option that would be silently ignored, did not pass on the layout of the pass,
            or is trained without one.
    """
    unknown = [name for name, value in options.items() if value is not None and name not in _SAYS_NOTHING]
    unknown += ["dropout"] * bool(dropout) + ["is_causal=False"] * (is_causal is False)
    if unknown:
        raise ValueError(f"attention of {type(module).__name__} must be plain to think, got {', '.join(unknown)}")
    layer = Layer(module, query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    if thoughts is not None:
        return thoughts.attend(layer, query, key, value), None
    if attention_mask is not None and attention_mask.numel() == 0:  # the dummy mask of a pass that has a layout
        raise ValueError(f"layers around {type(module).__name__} must hand on keyword arguments to think, got none")
    check_thinks(module, query)
    return layer.attend(query, key, value, attention_mask), None


AttentionInterface.register(ATTENTION_NAME, quietstar_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:  # fmt: skip
    """Like ``Layer.attend``, with scores c · tanh(score / c), which no attention library supports on every device."""
    rows, keys = query.shape[2], key.shape[2]
    packed = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # the heads of a group are rows of one head
    scores = torch.tanh((packed @ key.mT).float() * (scale / softcap)) * softcap
    scores = scores.unflatten(2, (-1, rows))  # [B, Hkv, group, rows, keys]
    if mask is None:
        mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
    else:
        mask = mask[:, :, None]
    # Not −∞: in transformers' masks rows of padding see nothing, and would spread NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    output = scores.softmax(dim=-1).to(query.dtype).flatten(2, 3) @ value
    return output.unflatten(2, (-1, rows)).flatten(1, 2).transpose(1, 2)
