"""Rounds of STaR with a model whose rationales are known."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from star_questions import FORM
from transformers import AutoModelForCausalLM, AutoTokenizer

from quietstar.star import NothingRightError, Settings, star
from quietstar.star.rounds import _train, collate

RUNS = Path(__file__).parents[2] / "runs"
SHORT = {"rounds": 2, "steps": 20, "max_new_tokens": 8, "batch_size": 2, "gradient_accumulation_steps": 2}
SHORT |= {"warmup_steps": 0, "learning_rate": 1e-2, "examples": "first"}


def test_steps_grow_as_the_authors_do():
    assert [Settings().steps_of(number) for number in range(1, 6)] == [40, 48, 57, 69, 82]


def test_a_batch_learns_what_stands_behind_the_questions():
    batch = collate([([5, 6, 7], 2), ([8, 9], 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100]]


def test_rounds(base_folder, task, examples, tmp_path):
    settings, reports = Settings(**SHORT), []
    results = star(
        base_folder, task, examples, tmp_path / "new", held_out=task, form=FORM, settings=settings,
        report=lambda results: reports.append(len(results["rounds"])),
    )  # fmt: skip
    assert results == json.loads((tmp_path / "new" / "results.json").read_text())
    assert reports == [0, 1, 2]
    first, second = results["rounds"]
    assert (results["base_accuracy"], results["questions"], results["held_out_questions"]) == (0.5, 4, 4)
    assert (first["right"], first["right_with_rationalisation"], first["kept"], first["steps"]) == (0.5, 0.75, 3, 20)
    assert (second["right"], second["steps"]) == (0.75, 24)  # what was rationalised was learnt
    assert first["accuracy"] == 0.75
    assert 0 < first["accuracy_error"] < 0.3

    rows = [json.loads(line) for line in (tmp_path / "new/rationales/round-1.jsonl").read_text().splitlines()]
    assert [(row["question"], row["rationale"], row["answer"], row["rationalised"]) for row in rows] == [
        ("Ann's boss", "--- Ben", "Cem", False),
        ("Dora's boss's aunt", "--- Eli", "Fay", False),
        ("Gus's boss", "--- Kim", "Jo", True),
    ]

    # The last model is the base, not the model of the round before, trained on the texts of the last round.
    model, tokenizer = (kind.from_pretrained(base_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    rows = [json.loads(line) for line in (tmp_path / "new/rationales/round-2.jsonl").read_text().splitlines()]
    prompts = [f"{row['question']} is" for row in rows]
    texts = [
        f"{prompt} {row['rationale']} --- {row['answer']}.<eos>" for prompt, row in zip(prompts, rows, strict=True)
    ]
    tokens = zip(tokenizer(texts)["input_ids"], tokenizer(prompts)["input_ids"], strict=True)
    _train(model, [(text, len(prompt)) for text, prompt in tokens], 24, 2, settings)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model")
    torch.testing.assert_close(dict(saved.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)


def test_without_rationalisation_and_with_examples_in_every_round(base_folder, task, examples, tmp_path):
    settings = Settings(**SHORT | {"rationalise": False, "learning_rate": 1e-9, "examples": "always"})
    results = star(base_folder, task, examples, tmp_path / "new", form=FORM, settings=settings)
    shares = [(row["right"], row["right_with_rationalisation"], row["accuracy"]) for row in results["rounds"]]
    assert shares == [(0.5, 0.5, None)] * 2
    assert results["base_accuracy"] is None


def test_nothing_right(base_folder, task, examples, tmp_path):
    settings = Settings(**SHORT | {"max_new_tokens": 3})
    with pytest.raises(
        NothingRightError, match=r"round 1 must have a rationale .* none for 4 questions, not even with"
    ):
        star(base_folder, task, examples, tmp_path / "new", form=FORM, settings=settings)


def test_a_loss_that_is_not_finite(base_folder, task, examples, tmp_path):
    settings = Settings(**SHORT | {"learning_rate": 1e30})
    with pytest.raises(FloatingPointError, match="the loss must be finite, got nan within 20 steps"):
        star(base_folder, task, examples, tmp_path / "new", form=FORM, settings=settings)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"rounds": 0}, ValueError, "rounds must be an integer >= 1, got 0"),
        ({"growth": 0.5}, ValueError, "growth must be >= 1, got 0.5"),
        ({"temperature": -1.0}, ValueError, "temperature must be >= 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer"),
        ({"examples": "never"}, ValueError, "examples must be 'always' or 'first', got 'never'"),
        ({"seed": -1}, ValueError, "seed must be an integer in"),
    ],
)
def test_bad_settings_are_named(values, error, message):
    with pytest.raises(error, match=message):
        Settings(**values)


@pytest.mark.slow
def test_in_the_quickstarts_world():
    results = runpy.run_path(str(RUNS / "star_world.py"))["star_on_world"](0)
    base, trained = results["base"], results["star"]
    assert max(base["at_once"], trained["at_once"]) < 0.1
    assert base["with_sampled_rationale"] < 0.7
    assert min(trained["with_rationale"], trained["with_sampled_rationale"]) > 0.95
