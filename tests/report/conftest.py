"""A byte-level model of random weights whose thoughts matter."""

from pathlib import Path

import pytest
import torch

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.quickstart.corpus import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat <script>alert(1)</script> " * 20], 300)


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    """Its checkpoint; windows of 256 tokens."""
    folder = tmp_path_factory.mktemp("byte_level") / "model"
    vocabulary = len(tokenizer)
    config = QuietStarConfig(
        vocab_size=vocabulary + 2, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, start_thought_token_id=vocabulary, end_thought_token_id=vocabulary + 1,
        thought_length=3, num_thoughts=1, initializer_range=0.4, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = QuietStarForCausalLM(config)
    torch.nn.init.normal_(model.mixing_head[-1].weight, std=0.3)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(model_folder):
    return QuietStarForCausalLM.from_pretrained(model_folder)
