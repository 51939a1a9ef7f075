"""``quietstar evaluate``."""

import json
import re

import character_model
import pytest
from questions import GSM8K, ROWS, write
from transformers import MistralConfig, MistralForCausalLM

from quietstar.cli import main
from quietstar.evaluation import answer_probabilities, greedy_answers, load_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return character_model.save(tmp_path_factory.mktemp("model"))


def evaluate(folder, task, data, *options):
    return main(["evaluate", "--model", str(folder), "--task", task, "--data", str(data), *map(str, options)])


@pytest.mark.parametrize("think", ["always", "never", "3.0"])
@pytest.mark.parametrize("name", ROWS)
def test_measures_and_writes(folder, tmp_path, capsys, name, think):
    data, output = write(tmp_path / "data.jsonl", ROWS[name]), tmp_path / "results.json"
    assert evaluate(folder, name, data, "--think", think, "--output", output) == 0
    captured, results = capsys.readouterr(), json.loads(output.read_text())
    think = think if think.isalpha() else float(think)
    task, model, tokenizer = load_task(name, data), character_model.make_model(), character_model.make_tokenizer()
    values = answer_probabilities(model, tokenizer, task, think=think).values
    assert [row["probability"] for row in results["answers"]] == pytest.approx(values.tolist())
    assert results["answer_probability"] == pytest.approx(float(values.mean()))
    assert results["answer_probability_error"] == pytest.approx(float(values.std() / len(values) ** 0.5))
    assert [row["said"] for row in results["answers"]] == greedy_answers(model, tokenizer, task, think=think)
    assert [row["answer"] for row in results["answers"]] == [question.answer for question in task.questions]
    assert (results["task"], results["think"], results["questions"]) == (name, think, len(ROWS[name]))
    assert re.search(r"the paper's accuracy\) +\d+\.\d\d% ± \d+\.\d\d%\n", captured.out)
    assert "100%" in captured.err  # the progress bars


def test_votes(folder, tmp_path, capsys):
    data, output = write(tmp_path / "data.jsonl", ROWS["qa"]), tmp_path / "results.json"
    assert evaluate(folder, "qa", data, "--samples", 3, "--draft_length", "auto", "--output", output) == 0
    assert "majority of samples (maj@3)" in capsys.readouterr().out
    results = json.loads(output.read_text())
    assert {"sampled", "sampled_error", "maj@3", "maj@3_error"} <= results.keys()
    assert all(len(row["samples"]) == 3 for row in results["answers"])


def test_says_what_was_cropped(folder, tmp_path, capsys):
    data, output = write(tmp_path / "data.jsonl", [{"question": "x" * 400, "answer": "1"}, *GSM8K]), tmp_path / "out"
    assert evaluate(folder, "gsm8k", data, "--output", output) == 0
    assert "1 questions were cropped to 256 tokens at a random place; of 1 of them nothing" in capsys.readouterr().out
    results = json.loads(output.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert (results["cropped"], results["left_out"]) == (1, 1)
    assert results["answers"][0]["probability"] is None


def test_nothing_may_be_left(folder, tmp_path):
    """Of no answer, since the random crop ends before it."""
    data, output = write(tmp_path / "data.jsonl", [{"question": "x" * 400, "answer": "1"}]), tmp_path / "out"
    assert evaluate(folder, "gsm8k", data, "--output", output) == 0
    assert json.loads(output.read_text(), parse_constant=pytest.fail)["answer_probability"] is None


def test_one_question_has_no_standard_error(folder, tmp_path):
    data, output = write(tmp_path / "data.jsonl", GSM8K), tmp_path / "results.json"
    assert evaluate(folder, "gsm8k", data, "--limit", 1, "--output", output) == 0
    assert json.loads(output.read_text(), parse_constant=pytest.fail)["exact_match_error"] is None


def test_an_existing_file_is_only_replaced_if_asked(folder, tmp_path, capsys):
    data, output = write(tmp_path / "data.jsonl", ROWS["qa"]), tmp_path / "results.json"
    output.write_text("precious")
    assert evaluate(folder, "qa", data, "--output", output) == 2
    assert "--output must be a new file without --overwrite" in capsys.readouterr().err
    assert output.read_text() == "precious"
    assert evaluate(folder, "qa", data, "--output", output, "--overwrite") == 0
    assert json.loads(output.read_text())["task"] == "qa"


def test_a_model_without_thoughts_is_refused(tmp_path, capsys):
    config = MistralConfig(
        vocab_size=98, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "base")
    character_model.make_tokenizer().save_pretrained(tmp_path / "base")
    assert evaluate(tmp_path / "base", "qa", write(tmp_path / "data.jsonl", ROWS["qa"])) == 2
    assert "must be a Quiet-STaR checkpoint, ours or the authors', got model type 'mistral'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], [], "data must hold at least one question, got none in"),
        ([{"question": "1"}], [], "got no 'answer' in line 1 of"),
        ([{"question": "1", "answer": "\u00e9"}], [], "answer must be made of valid tokens, got '<unk>'"),
        (ROWS["qa"], ["--batch_size", 0], "--batch_size must be an integer >= 1, got 0"),
        (ROWS["qa"], ["--limit", 0], "--limit must be an integer >= 1, got 0"),
        (ROWS["qa"], ["--samples", 0], "--samples must be an integer in [1, 1000], got 0"),
        (ROWS["qa"], ["--seed", -1], "--seed must be an integer in [0, 4294967295], got -1"),
        (ROWS["qa"], ["--think", "nan"], "--think must be 'always', 'never' or a threshold in nats >= 0, got nan"),
        (ROWS["qa"], ["--draft_length", 0], "--draft_length must be None, 'auto' or an integer >= 1, got 0"),
        (ROWS["qa"], ["--overwrite"], "--overwrite must be left out without --output"),
        (ROWS["qa"], ["--output", "/nowhere/out.json"], "--output must be in a folder that exists"),
        (ROWS["qa"], ["--output", "/"], "--output must be a file, got /"),
        (ROWS["qa"], ["--samples", 2, "--max_new_tokens", 512], "--max_new_tokens must be an integer in [1, 511], got"),
        (ROWS["qa"], ["--model", "./nowhere"], "cannot load --model ./nowhere"),
    ],
)
def test_bad_input_is_named(folder, tmp_path, capsys, rows, options, message):
    assert evaluate(folder, "qa", write(tmp_path / "data.jsonl", rows), *options) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
