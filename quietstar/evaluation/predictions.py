"""Predictions of the next token where they are wanted, after thinking where that is wanted."""

from typing import Literal

import torch
from torch import Tensor

from quietstar.models import QuietStarForCausalLM

Think = float | Literal["always", "never"]


@torch.no_grad()
def next_token_logits(
    model: QuietStarForCausalLM, input_ids: Tensor, positions: Tensor, think: Think = "always"
) -> Tensor:  # fmt: skip
    """Logits of the tokens behind some positions, float32 [B, K, V].

    Args:
        model: in evaluation mode.
        input_ids: int64 [B, L], padded on the right with any token.
        positions: int64 [K], of the same tokens in every text.
        think: as for ``generate``: with a threshold in nats, predictions without a thought stand where they have no
            more entropy. One thought is drawn behind every position, from torch's global generator.
    """
    if think == "always":
        return model(input_ids, logits_to_keep=positions, use_cache=False).logits.float()
    logits = model.predictor().logits(model.model(input_ids).last_hidden_state[:, positions]).float()
    if think == "never":
        return logits
    text = logits.index_fill(-1, torch.tensor(model.config.thought_token_ids, device=logits.device), -torch.inf)
    unsure = torch.special.entr(text.softmax(dim=-1)).sum(dim=-1) > think
    wanted = unsure.any(dim=0)
    if wanted.any():
        mixed = next_token_logits(model, input_ids, positions[wanted])
        logits[:, wanted] = torch.where(unsure[:, wanted, None], mixed, logits[:, wanted])
    return logits


def padded(rows: list[list[int]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of tokens as int64 [B, L], and their mask, 1 for tokens."""
    length = max(map(len, rows))
    tokens, mask = torch.zeros(2, len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(len(row))
        tokens[i, place], mask[i, place] = torch.tensor(row), 1
    return tokens.to(device), mask.to(device)


def batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Indices of texts in batches of like length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
