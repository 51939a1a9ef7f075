"""``quietstar star``."""

import json
import re

import character_model
import pytest
from star_questions import ROWS

from quietstar.cli import main

FORMAT = ["--template", "{question} is", "--hint", "{answer}. {question}", "--separator", "---", "--stop", "."]
SHORT = ["--rounds", "1", "--steps", "2", "--max_new_tokens", "8", "--batch_size", "4"]


@pytest.fixture
def star(base_folder, data, few_shot, tmp_path):
    def run(*options):
        given = ["--model", base_folder, "--data", data, "--few_shot", few_shot, "--output_dir", tmp_path / "new"]
        return main(["star", *map(str, given), *FORMAT, *SHORT, *map(str, options)])

    return run


def test_trains_and_says_so(star, data, tmp_path, capsys):
    assert star("--eval_data", data) == 0
    output = capsys.readouterr().out
    assert re.search(r"\n +base +50\.0%", output)
    assert re.search(r"\n +1 +50\.0% +75\.0% +3 +2 +\d+\.\d% +\d+\n", output)
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert (results["settings"]["steps"], results["format"]["separator"]) == (2, "---")
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"model", "rationales", "results.json"}
    assert star() == 2
    assert "--output_dir must be a new or an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "rounds must be an integer >= 1, got 0"),
        (["--few_shot", "nowhere"], "few_shot must be a text file of worked examples, got no file at nowhere"),
        (["--separator", "####"], "must have a rationale, the separator '####' and an answer"),
        (["--data", "nowhere.jsonl"], "data must be a JSON Lines file"),
        (["--model", "/nowhere"], "cannot load the tokenizer of /nowhere"),
        (["--max_new_tokens", "3"], "round 1 must have a rationale that leads to the right answer, got none for 4"),
        (["--max_new_tokens", "2000"], "few_shot must leave room within the model's 1024 positions"),
        (["--limit", "0"], "limit must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(star, capsys, options, message):
    assert star(*options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data must hold at least one question, got none"),
        (json.dumps(ROWS[0]) + '\n{"question": "Why"}\n', "got no 'answer' in line 2 of"),
    ],
)
def test_bad_data_is_named(star, tmp_path, capsys, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    assert star("--data", tmp_path / "bad.jsonl") == 2
    assert message in capsys.readouterr().err


def test_a_model_with_thoughts_is_refused(star, tmp_path, capsys):
    assert star("--model", character_model.save(tmp_path / "thinking")) == 2
    assert "a Quiet-STaR model, which has thoughts already" in capsys.readouterr().err
