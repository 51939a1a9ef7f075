"""``quietstar report`` from beginning to end, and what it refuses."""

import json
import re

import pytest
import word_model
from hostile_text import HOSTILE
from transformers import MistralConfig, MistralForCausalLM

from quietstar.cli import main


@pytest.fixture
def report(model_folder, tmp_path):
    """Runs the command on a text; returns the exit code."""

    def run(text, *options, model=model_folder):
        file = tmp_path / "text.txt"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        paths = {"--model": model, "--text": file, "-o": tmp_path / "report.html"}
        given = set(options)
        arguments = [str(part) for flag, path in paths.items() if flag not in given for part in (flag, path)]
        return main(["report", *arguments, *map(str, options)])

    return run


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page).group(1))


def test_a_text_becomes_a_page(report, tmp_path, capsys, tokenizer):
    assert report(HOSTILE * 4, "--thought_lengths", "2,0,3", "--window", 128, "--seed", 5) == 0
    assert "The report is in" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    count = len(tokenizer(HOSTILE * 4)["input_ids"])
    assert len(data_of(page)["rows"]) == count
    windows = -(-(count - 1) // 127)
    assert f"{count:,} tokens. The text was read in {windows} windows of 128 tokens (as --window says)" in page
    assert "<dt>Seed</dt><dd>5</dd>" in page
    assert "--thought_lengths 2,0,3 --window 128 --seed 5" in page
    assert "after thoughts of 0 tokens" in page
    assert "after thoughts of 3 tokens" not in page  # its own
    assert "alert(1)</script> </script>" not in page
    assert "flatters the thoughts" in page


def test_a_text_longer_than_the_positions_is_cut(report, tmp_path):
    assert report("the cat sat on the mat\n" * 200) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "windows of 256 tokens (the model has 256 positions)" in page


@pytest.mark.parametrize("text", ["ab", "a" * 3, "the cat\r\n sat 😀", "\ufeffthe cat"])
def test_short_texts(report, tmp_path, text):
    assert report(text) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "read in" not in page
    assert "\ufeff" not in page
    assert "No error: there is one window" in page


def test_words(report, tmp_path):
    assert report("the cat sat on zebra\n", model=word_model.save(tmp_path / "words")) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;unk&gt;" in page


@pytest.fixture
def base(tokenizer, tmp_path):
    """A factory of Mistral checkpoints that know the text's tokens, or fewer."""

    def save(vocabulary=300, positions=256):
        config = MistralConfig(
            vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, max_position_embeddings=positions,
        )  # fmt: skip
        MistralForCausalLM(config).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return save


@pytest.mark.parametrize("thinks", [False, True])
def test_a_base_model_says_how_hard_tokens_are(report, tmp_path, model_folder, base, thinks):
    assert report("the cat sat on the mat " * 5, "--base", model_folder if thinks else base()) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "How hard a token is says the model from before Quiet-STaR" in page
    assert "flatters" not in page


def test_an_existing_page_is_replaced_only_if_asked(report, tmp_path, capsys):
    (tmp_path / "report.html").write_text("mine")
    assert report("the cat") == 2
    assert "--output must not exist without --overwrite" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "mine"
    assert report("the cat", "--overwrite") == 0
    assert "mine" not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", [], "--text must hold text, got none in"),
        (" \n", [], "--text must hold text, got none in"),
        ("a", [], "--text must hold at least two tokens, got 1 in"),
        (b"\xff\xfea", [], "--text must be in UTF-8, got"),
        ("the cat", ["--text", "nowhere.txt"], "--text must be a file, got nowhere.txt"),
        ("the cat", ["-o", "no/where.html"], "--output must be in a folder that exists, got no/where.html"),
        ("the cat", ["-o", "."], "--output must be a file, got the folder ."),
        ("the cat", ["--model", "./nowhere"], "cannot load --model ./nowhere"),
        ("the cat", ["--base", "./nowhere"], "cannot load --base ./nowhere"),
        ("the cat", ["--window", "2"], "--window must be an integer in [3, 256], got 2"),
        ("the cat", ["--window", "257"], "--window must be an integer in [3, 256], got 257"),
        ("the cat", ["--seed", "-1"], "--seed must be an integer in [0, 4294967295], got -1"),
        ("the cat", ["--thought_lengths", "1,x"], "--thought_lengths must be integers with commas between, got '1,x'"),
        ("the cat", ["--thought_lengths=-1"], "--thought_lengths must be an integer >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named(report, tmp_path, capsys, text, options, message):
    assert report(text, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_model_without_thoughts(report, tmp_path, capsys, base, tokenizer):
    folder = base()
    tokenizer.save_pretrained(folder)
    assert report("the cat", model=folder) == 2
    assert "must be a Quiet-STaR checkpoint, ours or the authors', got model type 'mistral'" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"vocabulary": 99}, "--base must know every token of the text, got "),
        ({"positions": 4}, "--base must have 6 positions, as many as a window has tokens, got 4"),
    ],
)
def test_a_base_model_that_cannot_read_the_text(report, capsys, base, size, message):
    assert report("the cat sat on mats", "--base", base(**size)) == 2
    assert message in capsys.readouterr().err
