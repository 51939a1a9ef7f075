"""The command ``quietstar generate``."""

import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.cli import main

WORDS = ["<unk>", "the", "cat", "sat", "on", "a", "mat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint folder with a model of seven words."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>").save_pretrained(folder)
    config = QuietStarConfig(
        vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, start_thought_token_id=7, end_thought_token_id=8, thought_length=3, eos_token_id=None,
    )  # fmt: skip
    QuietStarForCausalLM(config).save_pretrained(folder)
    return str(folder)


def run(capsys, *arguments):
    code = main(["generate", *arguments])
    return code, *capsys.readouterr()


def test_continues_the_prompt(folder, capsys):
    code, out, _ = run(capsys, "--model", folder, "--prompt", "the cat", "--max_new_tokens", "5")
    assert code == 0
    assert out.startswith("the cat")


def test_shows_a_thought_for_every_token(folder, capsys):
    options = [
        "--model",
        folder,
        "--prompt",
        "the cat",
        "--max_new_tokens",
        "5",
        "--temperature",
        "1",
        "--show-thoughts",
    ]
    code, out, _ = run(capsys, *options)
    *lines, empty, text = out.splitlines()
    assert (code, empty) == (0, "")
    assert text.startswith("the cat")
    assert len(lines) == 5
    for line in lines:
        token, thought = re.fullmatch(r"'(.+)' +weight [+-]\d\.\d{3}  gain [+-]\d\.\d{3}  thought '(.+)'", line).groups()
        assert {token, *thought.split()} <= set(WORDS)
    assert run(capsys, *options)[1] == out  # the same seed, the same text
    assert run(capsys, *options, "--seed", "1")[1] != out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt must hold at least one token, got ''"),
        (["--prompt", "the", "--max_new_tokens", "0"], "max_new_tokens"),
        (["--prompt", "the", "--temperature", "-1"], "--temperature must be >= 0, got -1.0"),
        (["--prompt", "the", "--thought_temperature", "-1"], "thought_temperature must be >= 0, got -1.0"),
        (["--prompt", "the", "--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_named(folder, capsys, arguments, message):
    code, _, err = run(capsys, "--model", folder, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
