"""Text of one's own and the standard library's, and the table of what came of it."""

import json
import re

import pytest
import torch

from quietstar.evaluation import HeldOutNll
from quietstar.quickstart.corpus import read_texts, split_texts, train_tokenizer, windows_of
from quietstar.quickstart.text import results_table


def test_the_hardest_tokens_are_those_of_the_model_before():
    before = torch.arange(20.0).view(2, 10)  # the last two tokens are the hardest tenth
    base, mixed = torch.ones(2, 10), torch.zeros(2, 10)
    base[0, 0], mixed[1, 8:] = 100, 0.5
    rest = [torch.zeros(2, 10)] * 3  # which the table does not show
    table = results_table(HeldOutNll(before, before, *rest), HeldOutNll(base, mixed, *rest), speed=1234.5)
    numbers = {line[:36].strip(): re.findall(r"(-?[\d.]+) ±", line) for line in table.splitlines()}
    assert numbers["base model, before Quiet-STaR"] == ["9.5000", "18.5000"]
    assert numbers["after Quiet-STaR, without thoughts"] == ["5.9500", "1.0000"]
    assert numbers["after Quiet-STaR, after a thought"] == ["0.0500", "0.5000"]
    assert numbers["gain of the thought"] == ["5.9000", "0.5000"]
    assert "1,234 tokens/s" in table


def test_training_and_held_out_texts_are_apart_and_the_seed_decides():
    texts = read_texts("stdlib")
    train, held_out = split_texts(texts, seed=0, held_out_share=0.05)
    assert sorted(train + held_out) == sorted(texts)
    assert 0.04 < len(held_out) / len(texts) < 0.06
    assert split_texts(texts, seed=0, held_out_share=0.05) == (train, held_out)
    assert split_texts(texts, seed=1, held_out_share=0.05)[1] != held_out
    assert len(split_texts(["a", "b"], seed=0, held_out_share=0.05)[1]) == 1


def test_a_folder_of_texts(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "b.md").write_text("two – 2", encoding="utf-8")
    (tmp_path / "inner" / "a.py").write_text("one")
    (tmp_path / ".hidden").write_text("three")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "zeros").write_bytes(b"a\0b")
    assert read_texts(str(tmp_path)) == ["two – 2", "one"]


def test_a_file_of_paragraphs_or_rows(tmp_path):
    (tmp_path / "a.txt").write_text("one\nline\n\ntwo\n")
    assert [text.strip() for text in read_texts(str(tmp_path / "a.txt"))] == ["one\nline", "two"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("x", "y")))
    assert read_texts(str(tmp_path / "a.jsonl")) == ["x", "y"]


@pytest.mark.parametrize("name", ["nothing", "one.txt", "folder", "ids.jsonl"])
def test_too_little_to_read(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "ids.jsonl").write_text('{"text": [1, 2]}\n{"text": [3]}\n')
    (tmp_path / "one.txt").write_text("only one")
    source = str(tmp_path / name)
    with pytest.raises(ValueError, match=f"text must be 'stdlib', or a file or folder of two texts .*, got {source}"):
        read_texts(source)


def test_texts_shorter_than_a_window():
    tokenizer = train_tokenizer(["some text"], 300)
    with pytest.raises(
        ValueError, match="text must have at least 64 tokens to train on and held out, got fewer: title"
    ):
        windows_of(["text"], tokenizer, 64, "title")
