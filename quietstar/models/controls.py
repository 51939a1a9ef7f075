"""Control thoughts, which should not help: gains from these are not due to the content of thoughts."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from quietstar.models.configuration import QuietStarConfig
from quietstar.models.lengths import ends_are_behind
from quietstar.ops._checks import check_integer, check_range


def shuffle_thoughts(thoughts: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Exchange thoughts between positions so that none keeps its own, unless a single position is chosen.

    Args:
        thoughts: int [windows, N, L, k]; the N thoughts of a position stay together.
        chosen: bool [windows, L]: exchange only among these positions; the others keep theirs. Exchanging among
            positions of one kind removes what the thoughts say but not what they look like. Default: all positions.
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
    """Draw int64 tokens of a shape uniformly from ``range(vocabulary)`` without those ``left_out``, on the CPU."""
    tokens = torch.tensor([token for token in range(vocabulary) if token not in left_out])
    return tokens[torch.randint(len(tokens), tuple(shape))]


def random_like(thoughts: Tensor, config: QuietStarConfig) -> Tensor:
    """Draw random thoughts of the same lengths as the given ones, int64 [..., k], −1 after the end of each."""
    drawn = random_thoughts(thoughts.shape, config.vocab_size, config.thought_token_ids)
    return drawn.to(thoughts.device).masked_fill(thoughts < 0, -1)


def thoughts_of_call(
    thoughts: str | Tensor, batch: int, returned: int, new_tokens: int, config: QuietStarConfig
) -> Tensor | None:
    """Return the thoughts to use in a call of ``generate``, int64 [B, n, k], n = 1 or ``new_tokens``; None if sampled.

    Args:
        thoughts: the option of ``generate``.
        batch: B, rows of the text, with ``returned`` rows for every prompt.
        new_tokens: the largest number of tokens that will be generated.

    Raises:
        ValueError: given thoughts have the wrong shape or are out of range, or ``"shuffled"`` has a single prompt.
    """
    prompts = batch // returned
    if isinstance(thoughts, str):
        if thoughts == "shuffled" and prompts == 1:
            raise ValueError("thoughts must not be 'shuffled' with a single prompt, which has none to exchange with")
        if thoughts != "random":
            return None
        return random_thoughts((batch, new_tokens, config.thought_length), config.vocab_size, config.thought_token_ids)
    each = thoughts[:, None] if thoughts.dim() == 2 else thoughts
    if each.dim() != 3 or len(each) != prompts or (thoughts.dim() == 3 and each.shape[1] < new_tokens):
        raise ValueError(
            f"thoughts must have shape [{prompts}, k], or [{prompts}, n, k] with n >= {new_tokens} new tokens, "
            f"got {list(thoughts.shape)}"
        )
    check_integer("thoughts", thoughts)
    check_range("thoughts", thoughts, -1, config.vocab_size - 1)
    left_out = each < 0
    if config.learned_thought_end:
        if not ends_are_behind(each, may_lack=True):
            raise ValueError("thoughts must be -1 behind the end of a thought only, got -1 in front of a token")
    elif bool((left_out.any(dim=-1) & ~left_out.all(dim=-1)).any()):
        raise ValueError("thoughts must be -1 in all of their tokens (no thought there) or in none, got some of both")
    return each.repeat_interleave(returned, dim=0)
