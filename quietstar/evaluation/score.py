"""What a model thinks of a text, token by token: log-probabilities with and without thoughts."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar._numbers import SEED
from quietstar.models import QuietStarForCausalLM


class TextScore(NamedTuple):
    """Every token of a text but the first: n tokens, N thoughts in front of each, k tokens per thought; in nats."""

    tokens: Tensor  # int64 [n]
    base_logprobs: Tensor  # float [n], log p of the token without a thought
    logprobs: Tensor  # float [N, n], after each of the thoughts
    mixing_weight: Tensor  # [N, n], weight of the prediction after the thought
    thought_tokens: Tensor  # int64 [N, n, k], −1 behind the end of a thought


@torch.no_grad()
def score(model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, *, seed: int = 0) -> TextScore:
    """Log-probabilities of a text, ``model.config.num_thoughts`` thoughts in front of every token, in one tree pass.

    Args:
        model: put into evaluation mode while this runs.
        tokenizer: of the model.
        text: at least two tokens, as the tokenizer counts.
        seed: of the thoughts; the state of the random number generators is left as it was.

    Raises:
        TypeError, ValueError: a text of fewer tokens, or of more than the model has positions; a seed that is none.
    """
    SEED.check("seed", seed)
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    device, config, was_training = model.device, model.config, model.training
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
    length, positions = input_ids.shape[1], config.max_position_embeddings
    if not 2 <= length <= positions:
        raise ValueError(f"text must have 2 to max_position_embeddings = {positions} tokens, got {length}")
    # The objective wants text to look ahead at; padding on the right counts for nothing.
    missing = max(0, config.lookahead + 2 - length)
    padded = torch.nn.functional.pad(input_ids, (0, missing))
    mask = torch.nn.functional.pad(torch.ones_like(input_ids), (0, missing))
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model(padded, attention_mask=mask, labels=padded)
    model.train(was_training)
    new = length - 1
    return TextScore(
        input_ids[0, 1:],
        -output.base_nll[0, :new],
        -output.talk_nll[0, :, :new, 0],
        output.mixing_weight[0, :, :new, 0],
        output.thought_tokens[0, :, :new],
    )
