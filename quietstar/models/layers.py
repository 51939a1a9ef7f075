"""What Quiet-STaR adds to a decoder: the thought embeddings, the mixing head and the gain head."""

import torch
from torch import Tensor, nn

from quietstar.models.anchors import select
from quietstar.models.weights import is_plain


class ThoughtEmbedding(nn.Module):
    """A learned vector [H] that is multiplied by a scale on use, which multiplies the step size of its training."""

    def __init__(self, hidden_size: int, scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.scale = scale

    def forward(self) -> Tensor:
        return self.weight * self.scale


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""


class MixingHead(nn.Sequential):
    """Weight of the thought prediction from the two hidden states: MLP(concat(base, thought)), unbounded.

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
        """Mixing weights [B, ...] of thought states [B, ..., H].

        Args:
            base_hidden: [B, L, H]; without ``base_index`` it broadcasts with ``thought_hidden``.
            base_index: int [...] into L, or [B, ...] where texts have their own: the base state each thought state is
                mixed with.
        """
        first, *others = self
        own = base_index is not None and base_index.dim() == thought_hidden.dim() - 1
        if base_index is not None and is_plain(first):
            # It is linear in the concatenation: each base state is projected once for all its thoughts.
            base_weight, thought_weight = first.weight.chunk(2, dim=1)
            projected = select(nn.functional.linear(base_hidden, base_weight), base_index, own)
            hidden = nn.functional.linear(thought_hidden, thought_weight, first.bias) + projected
        else:  # as many base states, or an adapter or a quantiser has put another module in its place
            base_hidden = base_hidden if base_index is None else select(base_hidden, base_index, own)
            hidden = first(torch.cat([base_hidden.expand_as(thought_hidden), thought_hidden], dim=-1))
        for layer in others:
            hidden = layer(hidden)
        return hidden.squeeze(-1)


class ThoughtAlone(nn.Module):
    """In the place of a mixing head: the thought prediction has all the weight."""

    def forward(self, base_hidden: Tensor, thought_hidden: Tensor, base_index: Tensor | None = None) -> Tensor:
        """Ones, as of ``MixingHead``."""
        return thought_hidden.new_ones(thought_hidden.shape[:-1])


class GainHead(nn.Sequential):
    """What a thought behind a position is expected to gain for the next token, in nats: MLP(base state).

    The last layer starts at zero: before training no thought is expected to gain anything. No gradient reaches the
    states, so that what is learnt here changes nothing else.
    """

    def __init__(self, hidden_size: int):
        super().__init__(nn.Linear(hidden_size, hidden_size), nn.ReLU(), ZeroLinear(hidden_size, 1))

    def forward(self, base_hidden: Tensor) -> Tensor:
        """Expected gains [...] of base states [..., H]."""
        return super().forward(base_hidden.detach()).squeeze(-1)
