"""A model whose thoughts matter."""

import pytest
import torch

from quietstar import QuietStarConfig, QuietStarForCausalLM


@pytest.fixture
def model():
    config = QuietStarConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=None, initializer_range=0.3, thought_length=2, lookahead=3,
        num_thoughts=2, start_thought_token_id=38, end_thought_token_id=39,
    )  # fmt: skip
    model = QuietStarForCausalLM(config)
    torch.nn.init.normal_(model.mixing_head[-1].weight)
    return model
