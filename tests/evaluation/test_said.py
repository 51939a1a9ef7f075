"""Answers in the model's own words."""

import logging

import character_model
import pytest
import torch
from questions import GSM8K, ROWS, write

from quietstar.evaluation import greedy_answers, load_task, majority, sampled_answers


@pytest.fixture
def tokenizer():
    return character_model.make_tokenizer()


@pytest.fixture
def load(tmp_path):
    return lambda name, rows=None: load_task(name, write(tmp_path / "data.jsonl", rows or ROWS[name]))


@pytest.mark.parametrize("options", [{}, {"think": "never"}, {"think": 3.0}, {"draft_length": 3}], ids=str)
def test_greedy_answers_are_what_generate_says(tokenizer, load, monkeypatch, options):
    model, task, heard = character_model.make_model(), load("gsm8k"), []
    monkeypatch.setattr(task, "extract", lambda text: heard.append(text) or "x")
    assert greedy_answers(model, tokenizer, task, batch_size=3, **options) == ["x"] * 4
    for question, text in zip(task.questions, heard, strict=True):
        inputs = tokenizer(question.prompt, return_tensors="pt")["input_ids"]
        said = model.generate(inputs, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)[0]
        assert text == tokenizer.decode(said[inputs.shape[1] :], skip_special_tokens=True)


class Scripted:
    """Stands in for ``generate``: says one text after the other, behind any prompt."""

    def __init__(self, tokenizer, *texts):
        self.tokenizer, self.texts, self.prompts, self.options = tokenizer, list(texts), [], []

    def __call__(self, input_ids, attention_mask, **options):
        self.prompts += [
            self.tokenizer.decode(row[kept.bool()]) for row, kept in zip(input_ids, attention_mask, strict=True)
        ]
        self.options.append(options)
        rows = self.tokenizer(self.texts.pop(0))["input_ids"]
        return torch.cat([input_ids, torch.tensor(rows).expand(len(input_ids), -1)], dim=1)


def test_reasons_before_it_answers(tokenizer, load, monkeypatch):
    model, task = character_model.make_model(), load("gsm8k", GSM8K[:1])
    said = Scripted(tokenizer, " It is 3. \nQ: What else", " 3.<eos>44")
    monkeypatch.setattr(model, "generate", said)
    assert sampled_answers(model, tokenizer, task, 2, max_new_tokens=50) == [["3", "3"]]
    start = "Q: One and 2?\nA: Let's think step by step."
    assert said.prompts[:2] == [start] * 2
    assert said.prompts[2:] == [start + " It is 3.\nTherefore, the answer (arabic numerals) is"] * 2
    assert [options["max_new_tokens"] for options in said.options] == [50, 12]
    for options in said.options:
        assert (options["do_sample"], options["temperature"], options["top_k"], options["top_p"]) == (True, 0.7, 0, 1.0)


def test_own_questions_are_answered_at_once(tokenizer, load, monkeypatch):
    model, task = character_model.make_model(), load("qa")
    monkeypatch.setattr(model, "generate", said := Scripted(tokenizer, "out.", " in. "))
    assert sampled_answers(model, tokenizer, task, 1, batch_size=1) == [["in"], ["out."]]  # the longest prompt first
    assert said.options[0]["max_new_tokens"] == len(" out.")


@pytest.mark.parametrize("options", [{}, {"draft_length": 2}], ids=str)
def test_samples_differ_and_the_seed_decides(tokenizer, load, monkeypatch, options):
    model, task = character_model.make_model(), load("commonsense_qa")
    monkeypatch.setattr(task, "extract", lambda text: text)

    def sample(seed):
        return sampled_answers(model, tokenizer, task, 3, max_new_tokens=6, batch_size=4, seed=seed, **options)

    first = sample(0)
    assert [len(set(answers)) for answers in first] == [3, 3]
    assert sample(0) == first != sample(1)


def test_questions_that_do_not_fit_lose_their_beginning(tokenizer, load, caplog, monkeypatch):
    monkeypatch.setattr("quietstar.evaluation.said.logger", logging.getLogger("heard"))  # transformers' own is not
    model, task = character_model.make_model(max_position_embeddings=32), load("gsm8k")
    monkeypatch.setattr(model, "generate", said := Scripted(tokenizer, " 3"))
    greedy_answers(model, tokenizer, task)
    assert task.questions[2].prompt[-20:] in said.prompts
    assert "1 of 4 prompts are cut to their last 20 tokens, so that 12 more fit within the 32 positions" in caplog.text
    with pytest.raises(ValueError, match="max_new_tokens must be less than max_position_embeddings = 32, got 384"):
        sampled_answers(model, tokenizer, task, 1)


@pytest.mark.parametrize(
    ("answers", "winner"), [(["1", "2", "2"], "2"), (["1", "2"], "1"), ([None, None, "3"], "3"), ([None], None)]
)
def test_majority(answers, winner):
    assert majority(answers) == winner


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be an integer >= 1, got 0"),
        ({"samples": 1, "max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"samples": 1, "batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"samples": 1, "seed": -1}, "seed must be an integer in .*, got -1"),
        ({"samples": 1, "think": "often"}, "think must be 'always', 'never' or a threshold"),
        ({"samples": 1, "draft_length": 0}, "draft_length must be None, 'auto' or an integer >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(tokenizer, load, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sampled_answers(character_model.make_model(), tokenizer, load("qa"), **options)
