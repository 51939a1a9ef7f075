"""Code blocks of README and docs run as written, page by page, in a folder with the files that they name."""

import contextlib
import io
import json
import shlex
import sys

import datasets
import pytest
import torch
from docs.pages import PAGES, Block, blocks, name
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import quietstar
from quietstar.cli import main

WORDS = ["<unk>", "<|startthought|>", "<|endthought|>", "---", "the", "cat", "sat", "on", "a", "mat", "is", "Kim"]


def python_blocks(page) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python" and ">>>" not in block.code]


def commands(page) -> bool:
    return any(command.startswith("quietstar ") for block in blocks(page) for command in block.commands)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory: models that have learned nothing, texts, and questions."""
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    config = quietstar.QuietStarConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, start_thought_token_id=1, end_thought_token_id=2, thought_length=2, lookahead=2,
        max_position_embeddings=512, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = quietstar.QuietStarForCausalLM(config)
    for place in ("MODEL", "MODEL_FOLDER", "quickstart/model"):
        model.save_pretrained(tmp_path / place)
        fast.save_pretrained(tmp_path / place)
    text = "the cat sat on a mat " * 50
    (tmp_path / "text.txt").write_text(text)
    rows = "".join(json.dumps({"text": text}) + "\n" for _ in range(12))
    for file in ("text.jsonl", "web.jsonl"):
        (tmp_path / file).write_text(rows)
    datasets.Dataset.from_dict({"text": [text] * 12}).to_parquet("code.parquet")
    questions = [{"question": f"the {word} is", "answer": word} for word in ("cat", "mat")]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return tmp_path


@pytest.fixture
def names(folder):
    """What Python blocks may use without an import: the package's names, a model and its tokenizer."""
    public = {name: getattr(quietstar, name) for name in quietstar.__all__}
    model = quietstar.QuietStarForCausalLM.from_pretrained("MODEL")
    return public | {"__name__": "__main__", "model": model, "tokenizer": AutoTokenizer.from_pretrained("MODEL")}


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page) and not commands(page)], ids=name)
def test_python(page, names):
    for block in python_blocks(page):
        if block.not_run is None:
            exec(compile(block.code, name(page), "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_commands_and_python(page, names):
    """Of shell blocks, what calls quietstar."""
    for block in blocks(page):
        if block.not_run is not None:
            continue
        if block.language == "python" and ">>>" not in block.code:
            exec(compile(block.code, name(page), "exec"), names)
        for command in block.commands:
            if command.startswith("quietstar ") and command != "quietstar quickstart":  # a notebook runs that one
                _, *arguments = shlex.split(command, comments=True)
                output = io.StringIO()
                with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                    code = main(arguments)
                assert code == 0, (command, output.getvalue())
