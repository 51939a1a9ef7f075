"""A tiny model, text for it, and a trainer that writes into a temporary folder."""

import pytest
import torch
from transformers import TrainingArguments

from quietstar import QuietStarConfig, QuietStarForCausalLM, QuietStarTrainer
from quietstar.training.data import collate_windows

VOCABULARY, LENGTH = 40, 10


@pytest.fixture
def make_model():
    """A factory: the same random model every time; keyword arguments are fields of the configuration."""

    def make(**fields):
        torch.manual_seed(0)
        settings = {
            "thought_length": 2, "lookahead": 3, "num_thoughts": 2, "policy_weight": 1.0,
            "start_thought_token_id": VOCABULARY - 2, "end_thought_token_id": VOCABULARY - 1,
        }  # fmt: skip
        config = QuietStarConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=None, initializer_range=0.3, **settings | fields,
        )  # fmt: skip
        model = QuietStarForCausalLM(config)
        torch.nn.init.normal_(model.mixing_head[-1].weight)
        return model

    return make


@pytest.fixture
def windows():
    """Twelve windows of text."""
    return [{"input_ids": row} for row in torch.randint(1, VOCABULARY - 2, (12, LENGTH)).numpy()]


@pytest.fixture
def make_trainer(tmp_path, windows):
    """A factory: a trainer on the CPU; keyword arguments are those of TrainingArguments."""

    def make(model, callbacks=(), **arguments):
        defaults = {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2, "learning_rate": 1e-2}
        return QuietStarTrainer(
            model,
            TrainingArguments(**defaults | arguments, use_cpu=True, disable_tqdm=True),
            train_dataset=windows,
            eval_dataset=windows[:3],
            data_collator=collate_windows,
            callbacks=list(callbacks),
        )

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Prepared text goes to a temporary folder, not to the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
