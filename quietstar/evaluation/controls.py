"""Thoughts that should not help: whoever gains from these does not gain from what was thought."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def shuffle_thoughts(thoughts: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Thoughts exchanged between positions: none stays, unless a single position is chosen.

    Args:
        thoughts: int [windows, N, L, k]; the N thoughts of a position stay together.
        chosen: bool [windows, L]: exchange among these positions only, the others keep theirs. Among positions of
            one kind it is what the thoughts say that is taken away, not how they look. Default all.
    """
    by_position = thoughts.transpose(1, 2)  # [windows, L, N, k]
    chosen = torch.ones(by_position.shape[:2], dtype=torch.bool, device=thoughts.device) if chosen is None else chosen
    kept = by_position[chosen]
    order = torch.randperm(len(kept)).to(thoughts.device)
    exchanged = torch.empty_like(kept)
    exchanged[order] = kept[order.roll(1)]  # one cycle through all of them
    result = by_position.clone()
    result[chosen] = exchanged
    return result.transpose(1, 2)


def random_thoughts(shape: Sequence[int], vocabulary: int, left_out: Collection[int] = ()) -> Tensor:
    """Tokens drawn evenly from ``range(vocabulary)`` without those ``left_out``, int64 of a shape, on the CPU."""
    tokens = torch.tensor([token for token in range(vocabulary) if token not in left_out])
    return tokens[torch.randint(len(tokens), tuple(shape))]
