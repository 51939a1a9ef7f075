"""A tiny model, text for it, and a trainer that writes into a temporary folder; the same for the command."""

import json
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from quietstar import QuietStarConfig, QuietStarForCausalLM, QuietStarTrainer
from quietstar.cli import main
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


@pytest.fixture
def base(tmp_path):
    """A folder with a small Mistral and its tokenizer of 30 words."""
    folder = tmp_path / "base"
    config = MistralConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=None,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"---": 0} | {f"w{i}": i for i in range(1, 30)}, unk_token="---"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="---").save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    """A file with twenty documents of thirty words."""
    documents = [" ".join(f"w{i}" for i in torch.randint(1, 30, (30,)).tolist()) for _ in range(20)]
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return file


@pytest.fixture
def run(base, text, tmp_path):
    """Runs the command with small sizes; later flags override earlier ones, and some may be left ``without``."""
    sizes = (
        "--block_size 10 --held_out_fraction 0.2 --per_device_train_batch_size 2 --max_steps 4 --logging_steps 2 "
        "--eval_steps 2 --save_steps 2 --learning_rate 1e-2 --warmup_steps 1 --report_to none --use_cpu --disable_tqdm "
        "true --dataloader_pin_memory false --thought_length 2 --num_thoughts 1"
    )

    def run(*flags, without=()):
        required = ["--model", str(base), "--data", str(text), "--output_dir", str(tmp_path / "out")]
        usual = sizes
        for name in without:
            usual = re.sub(rf"{name} \S+", "", usual)
        return main(["train", *required, *usual.split(), *map(str, flags)])

    return run


@pytest.fixture
def tokenizer():
    """Words a, b, c are 1, 2, 3; the end of a text is 0."""
    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
