"""The decoder of any family, run by its own forward on rows that a layout describes."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from quietstar.models.layouts import Layout
from quietstar.ops._dtensor import gathered, is_dtensor, is_fsdp_unit


@dataclass
class HiddenStates:
    """Collects the hidden states [B, L, H] of a text before each layer and at the end."""

    length: int
    states: list[Tensor] = field(default_factory=list)

    def take(self, hidden: Tensor) -> Tensor:
        """Store the first L of ``hidden`` [B, rows, H], and return rows computed from them, so they get a gradient."""
        text, thoughts = hidden.tensor_split([self.length], dim=1)
        self.states.append(text)
        return torch.cat([text, thoughts], dim=1)

    @contextmanager
    def in_front_of(self, layers: nn.ModuleList) -> Iterator[None]:
        """Collect the input of each layer inside the context."""
        hooks = [layer.register_forward_pre_hook(lambda _, rows: (self.take(rows[0]), *rows[1:])) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class Decoder:
    """Runs a family's decoder, which keeps its own rotary embeddings, multipliers, norms and kinds of layers.

    Attributes:
        module: the decoder, without a head.
        positions: the largest number of positions, see ``positions_of_short_texts``.
    """

    module: PreTrainedModel
    positions: int | None = None

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., H]."""
        embedding = self.module.embed_tokens
        weight = getattr(embedding, "weight", None)
        if is_dtensor(weight) and not is_fsdp_unit(embedding):  # FSDP gathers it only while the decoder runs
            return functional_call(embedding, {"weight": gathered("embed_tokens", weight)}, tokens)
        return embedding(tokens)

    def __call__(
        self, rows: Tensor, position_ids: Tensor, layout: Layout, collect: HiddenStates | None = None
    ) -> Tensor:  # fmt: skip
        """Compute the final hidden states [B, rows, H].

        The layout keeps keys and values, so the decoder gets no cache. It also defines the mask, so the decoder gets a
        dummy mask of 4 dimensions, which transformers passes on unchanged. It fits no attention, so that a family that
        drops the layout fails.

        Args:
            rows: embeddings [B, rows, H].
            position_ids: int64 [B, rows].
            layout: the layout of the rows.
            collect: collects the hidden states of the text.

        Raises:
            ValueError: there are so many positions that the rotary embeddings would change.
        """
        if self.positions is not None and int(position_ids.max()) >= self.positions:
            raise ValueError(
                f"position_ids of text and thoughts must be below {self.positions}, where rotary embeddings of type "
                f"'dynamic' and 'longrope' change for all tokens, got {int(position_ids.max())}"
            )
        with nullcontext() if collect is None else collect.in_front_of(self.module.layers):
            hidden = _forward_of(self.module)(
                inputs_embeds=rows, position_ids=position_ids, attention_mask=rows.new_empty(1, 1, 0, 0),
                use_cache=False, thoughts=layout,
            ).last_hidden_state  # fmt: skip
        return hidden if collect is None else collect.take(hidden)


def _forward_of(decoder: PreTrainedModel) -> Callable[..., ModelOutput]:
    """Return the decoder's forward without transformers' decorators, unless something else wraps it.

    These decorators fill in defaults from the configuration and capture outputs. Neither is needed here, and when a
    small model generates, they take a tenth of the time.
    """
    hooks = decoder._forward_hooks or decoder._forward_pre_hooks or decoder._backward_hooks
    if hooks or decoder._compiled_call_impl is not None or "forward" in vars(decoder):
        return partial(decoder, return_dict=True, output_hidden_states=False)
    return partial(_undecorated(type(decoder)), decoder)


@cache
def _undecorated(kind: type[PreTrainedModel]) -> Callable[..., ModelOutput]:
    return inspect.unwrap(kind.forward)
