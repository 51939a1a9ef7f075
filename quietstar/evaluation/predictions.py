"""Predictions of the next token at given positions, after thinking at all or some of them."""

import torch
from torch import Tensor

from quietstar.models import QuietStarForCausalLM
from quietstar.models.defaults import DEFAULT, Think, choose


@torch.no_grad()
def next_token_logits(
    model: QuietStarForCausalLM, input_ids: Tensor, positions: Tensor, think: Think = "always"
) -> Tensor:  # fmt: skip
    """Compute the logits of the tokens after some positions, float32 [B, K, V].

    Args:
        model: the model, in evaluation mode.
        input_ids: int64 [B, L], padded on the right with any token.
        positions: int64 [K], the same in every text.
        think: as in ``generate``. With a threshold in nats, the prediction without a thought is used where it has no
            more entropy; with "learned", where no more than the model's ``gain_threshold`` is expected. One thought is
            sampled after every position where any text thinks, from torch's global generator.
    """
    if think == "always":
        return model(input_ids, logits_to_keep=positions, use_cache=False).logits.float()
    predictor, hidden = model.predictor(), model.model(input_ids).last_hidden_state[:, positions]
    logits = predictor.logits(hidden).float()
    if think == "never":
        return logits
    text = logits.index_fill(-1, torch.tensor(model.config.thought_token_ids, device=logits.device), -torch.inf)
    threshold = choose("gain_threshold", DEFAULT, model.generation_config, model.config)
    worth_it = predictor.worth_a_thought(hidden, text, think, threshold)
    wanted = worth_it.any(dim=0)
    if wanted.any():
        mixed = next_token_logits(model, input_ids, positions[wanted])
        logits[:, wanted] = torch.where(worth_it[:, wanted, None], mixed, logits[:, wanted])
    return logits


def padded(rows: list[list[int]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Pad rows of tokens to int64 [B, L], and return also their mask, 1 for tokens."""
    length = max(map(len, rows))
    tokens, mask = torch.zeros(2, len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(len(row))
        tokens[i, place], mask[i, place] = torch.tensor(row), 1
    return tokens.to(device), mask.to(device)


def batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Group texts of similar length into batches of indices, longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
