"""The layers that Quiet-STaR adds to a decoder: thought embeddings, mixing head and gain head."""

import torch
from torch import Tensor, nn

from quietstar.models.anchors import select
from quietstar.models.weights import is_plain


class ThoughtEmbedding(nn.Module):
    """A learned vector [H], multiplied by a scale when it is used, which multiplies its step size in training."""

    def __init__(self, hidden_size: int, scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.scale = scale

    def forward(self) -> Tensor:
        return self.weight * self.scale


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""


class MixingHead(nn.Sequential):
    """Predicts the (unbounded) weight of the thought's prediction from both hidden states: MLP(concat(base, thought)).

    The last layer starts at zero, so that training starts exactly at the base model.
    """

    def __init__(self, hidden_size: int):
        super().__init__(
            nn.Linear(2 * hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            ZeroLinear(hidden_size, 1, bias=False),
        )

    def forward(self, base_hidden: Tensor, thought_hidden: Tensor, base_index: Tensor | None = None) -> Tensor:
        """Compute mixing weights [B, ...] for thought states [B, ..., H].

        Args:
            base_hidden: [B, L, H]; without ``base_index``, it broadcasts against ``thought_hidden``.
            base_index: int [...], or [B, ...] if texts differ: index into L of the base state that each thought state
                is mixed with.
        """
        first, *others = self
        own = base_index is not None and base_index.dim() == thought_hidden.dim() - 1
        if base_index is not None and is_plain(first):
            # The first layer is linear in the concatenation, so each base state is projected once for all its thoughts.
            base_weight, thought_weight = first.weight.chunk(2, dim=1)
            projected = select(nn.functional.linear(base_hidden, base_weight), base_index, own)
            hidden = nn.functional.linear(thought_hidden, thought_weight, first.bias) + projected
        else:  # as many base states as thoughts, or an adapter or quantiser has replaced the layer
            base_hidden = base_hidden if base_index is None else select(base_hidden, base_index, own)
            hidden = first(torch.cat([base_hidden.expand_as(thought_hidden), thought_hidden], dim=-1))
        for layer in others:
            hidden = layer(hidden)
        return hidden.squeeze(-1)


class ThoughtAlone(nn.Module):
    """A mixing head that always gives the thought's prediction the whole weight."""

    def forward(self, base_hidden: Tensor, thought_hidden: Tensor, base_index: Tensor | None = None) -> Tensor:
        """Return ones, in the shape of ``MixingHead``'s weights."""
        return thought_hidden.new_ones(thought_hidden.shape[:-1])


class GainHead(nn.Sequential):
    """Predicts how much a thought at a position will gain for the next token, in nats: MLP(base state).

    The last layer starts at zero, so before training no gain is expected. No gradient reaches the base states, so
    training this head changes nothing else.
    """

    def __init__(self, hidden_size: int):
        super().__init__(nn.Linear(hidden_size, hidden_size), nn.ReLU(), ZeroLinear(hidden_size, 1))

    def forward(self, base_hidden: Tensor) -> Tensor:
        """Compute expected gains [...] from base states [..., H]."""
        return super().forward(base_hidden.detach()).squeeze(-1)
