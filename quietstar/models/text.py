"""The input text of a call: tokens or their embeddings, with mask and positions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar.models.documents import document_starts, first_key
from quietstar.models.layouts import ThoughtStates
from quietstar.models.transformers_names import CACHE
from quietstar.ops._checks import Dims, check_integer, check_range, check_tensor


def check_tokens(name: str, tokens: Tensor, vocab_size: int, ignore: int | None = None) -> None:
    """Check that values are token ids of the vocabulary, or ``ignore``.

    Raises:
        TypeError, ValueError: values are not integers or are out of range.
    """
    check_tensor(name, tokens)
    check_integer(name, tokens)
    check_range(name, tokens if ignore is None else tokens.masked_fill(tokens == ignore, 0), 0, vocab_size - 1)


def check_left_out(why: str, **arguments: object) -> None:
    """Check that arguments which have no meaning here are None.

    Raises:
        ValueError: one of them is not None.
    """
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} must be left out {why}, got {type(value).__name__}")


@dataclass(frozen=True)
class Text:
    """B texts of L tokens, as given by the caller.

    Attributes:
        input_ids: int64 [B, L]; None if embeddings were given.
        inputs_embeds: [B, L, H]; None if tokens were given.
        attention_mask, position_ids: as in ``QuietStarForCausalLM.forward``.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None

    @classmethod
    def of(
        cls,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> "Text":
        """Create a text whose shapes are checked.

        Raises:
            TypeError, ValueError: neither or both of tokens and embeddings are given, or a shape is wrong.
        """
        if (input_ids is None) == (inputs_embeds is None):
            came = "neither" if input_ids is None else "both"
            raise ValueError(f"input_ids or inputs_embeds must be given, one of them, got {came}")
        dims = Dims()
        if input_ids is None:
            dims.bind("inputs_embeds", inputs_embeds, "B L H")
        else:
            dims.bind("input_ids", input_ids, "B L")
        if position_ids is not None and tuple(position_ids.shape) not in ((dims["B"], dims["L"]), (1, dims["L"])):
            raise ValueError(
                f"position_ids must have shape {[dims['B'], dims['L']]} or {[1, dims['L']]}, "
                f"got {list(position_ids.shape)}"
            )
        return cls(input_ids, inputs_embeds, attention_mask, position_ids)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return tuple(self._given.shape[:2])

    @property
    def device(self) -> torch.device:
        return self._given.device

    @property
    def _given(self) -> Tensor:
        return self.inputs_embeds if self.input_ids is None else self.input_ids

    def positions(self, past: int | Tensor = 0) -> Tensor:
        """Return position ids [B, L]; by default they follow ``past`` tokens."""
        positions = self.position_ids
        if positions is None:
            positions = torch.arange(self.shape[1], device=self.device)[None] + past
        return positions.expand(self.shape)

    def starts(self, past: int | Tensor, cached: bool | None, states: ThoughtStates | None) -> Tensor | None:
        """Find where documents begin in ``past`` tokens and this text, see ``quietstar.models.documents``.

        Args:
            past: number of tokens in the cache.
            cached: whether there is or will be a cache.
            states: states of ``generate``, which have already read the mask.
        """
        find = first_key if states is None else states.first_key
        padding = find(self.attention_mask, (self.shape[0], past + self.shape[1]))
        mask = self.attention_mask
        if self.shape[1] == 1 or self.position_ids is None or (mask is not None and mask.dim() == 1):
            return padding
        packed = document_starts(None if mask is None else mask[:, -self.shape[1] :], self.position_ids, self.shape)
        if packed is None or packed.dim() == 1:
            return padding
        if cached:
            raise ValueError(
                f"position_ids must go up by one with use_cache or a {CACHE}, got packed documents: whoever reads the "
                "cache could not tell them apart"
            )
        return packed

    def embedded(self, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Return embeddings [B, L, H]."""
        return embed(self.input_ids) if self.inputs_embeds is None else self.inputs_embeds

    def embedded_with(self, others: Tensor, embed: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Embed the text [B, L, H] and ``others``, int64 [B, n]: [B, n, H].

        If both are tokens this is one call, since each call creates a gradient of the size of the vocabulary.
        """
        if self.input_ids is None:
            return self.inputs_embeds, embed(others)
        together = embed(torch.cat([self.input_ids, others], dim=1))
        return together.split([self.shape[1], others.shape[1]], dim=1)
