"""Small models that think visibly: large random weights, a mixing head that is not zero."""

import pytest
import torch

from quietstar import QuietStarConfig, QuietStarForCausalLM

VOCABULARY = 40


@pytest.fixture
def make_model():
    """A factory: a random model in evaluation mode; keyword arguments are fields of the configuration."""

    def make(**fields):
        config = QuietStarConfig(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "sliding_window": None,
                "max_position_embeddings": 256,
                "initializer_range": 0.3,
                "thought_length": 3,
                "lookahead": 2,
                "num_thoughts": 2,
                "policy_weight": 1.0,
                "start_thought_token_id": VOCABULARY - 2,
                "end_thought_token_id": VOCABULARY - 1,
                "pad_token_id": 0,
                "eos_token_id": None,
                "bos_token_id": None,
            }
            | fields
        )
        model = QuietStarForCausalLM(config).eval()
        if config.prediction == "mixed":
            torch.nn.init.normal_(model.mixing_head[-1].weight)
        return model

    return make


@pytest.fixture
def text():
    """Two sequences of 12 ordinary tokens."""
    return torch.randint(1, VOCABULARY - 2, (2, 12))
