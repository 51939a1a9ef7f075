"""The log-probabilities of a text, token by token, with and without thoughts."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar._numbers import SEED
from quietstar.models import QuietStarForCausalLM


class TextScore(NamedTuple):
    """Values for every token of a text except the first: n tokens, N thoughts before each, k tokens per thought."""

    tokens: Tensor  # int64 [n]
    base_logprobs: Tensor  # float [n], log p of the token without a thought, in nats
    logprobs: Tensor  # float [N, n], log p after each of the thoughts, in nats
    mixing_weight: Tensor  # [N, n], weight of the prediction after the thought
    thought_tokens: Tensor  # int64 [N, n, k], −1 after the end of a thought


@torch.no_grad()
def score(model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, *, seed: int = 0) -> TextScore:
    """Compute the log-probabilities of a text with ``model.config.num_thoughts`` thoughts before every token.

    All thoughts are evaluated in one pass (the thought tree).

    Args:
        model: the model; in evaluation mode during the call.
        tokenizer: the model's tokenizer.
        text: the text, of at least two tokens.
        seed: seed of the thoughts. The state of the random number generators is restored.

    Raises:
        TypeError, ValueError: the text has fewer than two tokens or more than the model has positions, or the seed is
            invalid.
    """
    SEED.check("seed", seed)
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    device, config, was_training = model.device, model.config, model.training
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
    length, positions = input_ids.shape[1], config.max_position_embeddings
    if not 2 <= length <= positions:
        raise ValueError(f"text must have 2 to max_position_embeddings = {positions} tokens, got {length}")
    # The objective needs text to look ahead at; padding on the right does not count.
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
