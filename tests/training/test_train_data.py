"""The command `quietstar train` on text of every kind."""

import json
import re
import shutil

import pytest
import torch
from datasets import load_dataset
from transformers import AutoTokenizer

from quietstar import QuietStarForCausalLM


@pytest.fixture
def words(text):
    """The documents of the file as lists of words."""
    return [json.loads(line)["text"].split() for line in text.read_text().splitlines()]


def as_csv(folder, words):
    (folder / "a.csv").write_text("text\n" + "\n".join(map(" ".join, words)))
    return folder / "a.csv"


def as_saved(folder, words):
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": " ".join(row)}) for row in words))
    load_dataset("json", data_files=str(folder / "a.jsonl"), split="train").save_to_disk(folder / "saved")
    return folder / "saved"


def as_messages(folder, words):
    talks = [
        [{"role": "user", "content": " ".join(row[:15])}, {"role": "w1", "content": " ".join(row)}] for row in words
    ]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    return folder / "chat.jsonl"


def as_token_ids(folder, words):
    (folder / "ids.jsonl").write_text("\n".join(json.dumps({"input_ids": [int(w[1:]) for w in row]}) for row in words))
    return folder / "ids.jsonl"


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
@pytest.mark.parametrize("write", [as_csv, as_saved, as_messages, as_token_ids])
def test_text_of_every_kind_trains(run, base, words, tmp_path, write, streaming):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(base)
    data = write(tmp_path, words)
    flags = ["--streaming"] if streaming else []
    assert run("--data", data, "--eval_data", data, "--separate_documents", "--max_steps", 1, *flags) == 0
    assert "eval_loss" in json.loads((tmp_path / "out" / "eval_results.json").read_text())


def test_a_stream_killed_and_resumed_gives_the_same_model(run, text, tmp_path):
    """Eight steps of two windows, and a checkpoint behind the first epoch, of as many windows as documents or fewer."""
    documents = text.read_text().splitlines()
    text.write_text("\n".join(documents[:2]))
    flags = "--streaming", "--held_out_fraction", 0, "--max_steps", 8, "--eval_strategy", "no", "--logging_steps", 1
    assert run(*flags, "--save_steps", 5) == 0
    out = tmp_path / "out"
    whole = QuietStarForCausalLM.from_pretrained(out).state_dict()
    losses = json.loads((out / "trainer_state.json").read_text())["log_history"]
    for folder in (out / "checkpoint-8", out / "model.safetensors"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    assert run(*flags, "--save_steps", 5, "--resume_from_checkpoint", "last") == 0
    again = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [log["loss"] for log in again if "loss" in log] == [log["loss"] for log in losses if "loss" in log]
    resumed = QuietStarForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--streaming", "--max_steps", -1], "max_steps must be given with streaming, where nobody knows how long"),
        (["--streaming", "--workers", 2], "workers must be left out with streaming, got 2; dataloader_num_workers"),
        (
            ["--streaming", "--data_split", "train[:5]"],
            r"data_split must be a whole split with streaming, got 'train\[",
        ),
        (["--data", "a.txt:1", "b.txt"], "data must have weights for all sources or for none, got a.txt:1 b.txt"),
        (["--data", "a.txt:0", "b.txt:1"], r"the weight of a\.txt in data must be > 0, got 0\.0"),
        (["--eval_data", "none.csv"], "data must be a file or the name of a dataset, got no file at none.csv"),
        (["--text_column", "messages"], "text_column must be one of 'text', got 'messages'"),
        (["--data", "{tmp}/chat.jsonl"], "tokenizer must have a chat template for messages, got none in .*base: "),
        (["--data", "{tmp}/ids.jsonl"], r"input_ids must be in \[0, 32\), the model's vocabulary, got 40: "),
        (["--data", "{tmp}/ids.jsonl", "--streaming"], r"input_ids must be in \[0, 32\), .* got 40: "),
        (["--data", "{tmp}/late/*", "--streaming"], r"data must be JSON Lines in UTF-8, got line 1 of .*b\.jsonl"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_text_that_cannot_be_used_is_named(run, words, text, tmp_path, capsys, flags, message):
    as_messages(tmp_path, words)
    as_token_ids(tmp_path, [*words[:-1], ["w1"] * 20 + ["w40"] * 10])
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "a.jsonl").write_text("\n".join([text.read_text()] * 150))
    (tmp_path / "late" / "b.jsonl").write_text("{oh")
    try:
        code = run("--held_out_fraction", 0, "--max_steps", 1, *(str(flag).format(tmp=tmp_path) for flag in flags))
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert re.search(f"^quietstar train: (error: )?{message}", capsys.readouterr().err, re.MULTILINE)
