"""The README's Python examples run as written."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStarConfig, QuietStarForCausalLM

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def quickstart_folder(tmp_path, monkeypatch):
    """The working directory after ``quietstar quickstart``, with a model that has learnt nothing."""
    folder = tmp_path / "quickstart" / "model"
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "def": 1, "path": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    config = QuietStarConfig(
        vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, start_thought_token_id=3, end_thought_token_id=4, thought_length=2,
    )  # fmt: skip
    QuietStarForCausalLM(config).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)


def test_there_are_examples_of_ops_and_generation():
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number, quickstart_folder):
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})
