"""A random model of single characters, whose tokenizer can express every task."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStarConfig, QuietStarForCausalLM

CHARACTERS = ["<eos>", "<unk>", "\n", *map(chr, range(32, 127))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {character: i for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def make_model(**fields: object) -> QuietStarForCausalLM:
    size = len(CHARACTERS)
    settings = {
        "vocab_size": size + 2, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5, "thought_length": 2,
        "start_thought_token_id": size, "end_thought_token_id": size + 1, "eos_token_id": 0,
        "max_position_embeddings": 512, "sliding_window": None, "thought_temperature": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = QuietStarForCausalLM(QuietStarConfig(**settings | fields))
    torch.nn.init.normal_(model.mixing_head[-1].weight)
    return model.eval()


def save(folder: Path, **fields: object) -> str:
    """Write model and tokenizer into ``folder``; returns its name."""
    make_tokenizer().save_pretrained(folder)
    make_model(**fields).save_pretrained(folder)
    return str(folder)
