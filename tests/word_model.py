"""A checkpoint folder with a random model of seven words, for tests of commands."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStarConfig, QuietStarForCausalLM

WORDS = ["<unk>", "the", "cat", "sat", "on", "a", "mat"]


def save(folder: Path, chat_template: str | None = None) -> str:
    """Write model and tokenizer into ``folder``; returns its name."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    config = QuietStarConfig(
        vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, start_thought_token_id=7, end_thought_token_id=8, thought_length=3, eos_token_id=None,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = QuietStarForCausalLM(config)
    model.lm_head.weight.data[0] = 0  # says words, not <unk>, which is not printed
    torch.nn.init.normal_(model.mixing_head[-1].weight)
    model.save_pretrained(folder)
    return str(folder)
