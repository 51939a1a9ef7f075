"""The paper's measure, against itself computed as slowly as it is described."""

import character_model
import pytest
import torch
import word_model
from questions import GSM8K, ROWS, write
from transformers import AutoTokenizer

from quietstar.evaluation import answer_probabilities, load_task

ALLOWED = {"gsm8k": "0123456789\n", "commonsense_qa": "ABCDE\n", "qa": " inout."}


@pytest.fixture
def tokenizer():
    return character_model.make_tokenizer()


@pytest.fixture
def load(tmp_path):
    return lambda name, rows=None: load_task(name, write(tmp_path / "data.jsonl", rows or ROWS[name]))


@torch.no_grad()
def literally(model, text, answer_from, allowed, think):
    """One token of the answer at a time, all logits, one text at a time; thoughts are greedy."""
    token_of = {character: i for i, character in enumerate(character_model.CHARACTERS)}
    tokens = torch.tensor([[token_of[character] for character in text]])
    probability = 1.0
    for i in range(max(1, answer_from), len(text)):
        if text[i] not in allowed:
            continue
        base = model.lm_head(model.model(tokens[:, :i]).last_hidden_state)[0, -1]
        thoughtful = model(tokens[:, :i]).logits[0, -1]
        over_text = base[: len(token_of)].softmax(0)
        entropy = -(over_text * over_text.log()).sum()
        thinks = think == "always" or (think != "never" and entropy > think)
        p = (thoughtful if thinks else base).softmax(0)
        probability *= float(p[token_of[text[i]]] / sum(p[token_of[character]] for character in allowed))
    return probability


@pytest.mark.parametrize("think", ["always", "never", 3.0])
@pytest.mark.parametrize("name", ALLOWED)
def test_equals_the_literal_computation(tokenizer, load, name, think):
    model, task = character_model.make_model(), load(name)
    result = answer_probabilities(model, tokenizer, task, think=think, batch_size=3)
    expected = [
        literally(model, question.prompt + question.continuation, len(question.prompt), ALLOWED[name], think)
        for question in task.questions
    ]
    torch.testing.assert_close(result.values, torch.tensor(expected, dtype=torch.float64), atol=0, rtol=1e-4)
    assert sorted(tokenizer.convert_ids_to_tokens(result.valid_tokens)) == sorted(ALLOWED[name])
    assert (result.cropped, result.max_length) == (0, 256)


def test_a_threshold_lies_between_always_and_never(tokenizer, load):
    model, task = character_model.make_model(), load("gsm8k")
    values = [answer_probabilities(model, tokenizer, task, think=think).values for think in ("always", 3.0, "never")]
    assert len({tuple(x.tolist()) for x in values}) == 3  # the tests above tell the three apart
    assert torch.equal(answer_probabilities(model, tokenizer, task, think=0.0).values, values[0])
    assert torch.equal(answer_probabilities(model, tokenizer, task, think=99.0).values, values[2])


@pytest.mark.parametrize(("fields", "given"), [({}, 47), ({"max_position_embeddings": 47}, 256)])
def test_long_texts_are_cropped_at_random(tokenizer, load, fields, given):
    rows = [{"question": "x" * 40, "answer": "12"}, GSM8K[0]]
    model, task, length = character_model.make_model(**fields), load("gsm8k", rows), 47
    text, start = task.questions[0].prompt + task.questions[0].continuation, len(task.questions[0].prompt)
    crops = range(len(text) - length + 1)
    possible = [
        literally(model, text[i : i + length], start - i, ALLOWED["gsm8k"], "always")
        if i + length > start + 1
        else None
        for i in crops
    ]
    seen = set()
    for seed in range(12):
        result = answer_probabilities(model, tokenizer, task, seed=seed, max_length=given)
        assert (result.cropped, result.max_length) == (1, length)
        assert not result.values[1].isnan()
        value = None if result.values[0].isnan() else float(result.values[0])
        close = [i for i, p in enumerate(possible) if value == p or (value and p and abs(value / p - 1) < 1e-4)]
        assert close
        seen.add(close[0])
    assert len(seen) == 4  # all of the answer, two parts of it, nothing


def test_the_seed_decides_and_nothing_else_is_touched(tokenizer, load):
    model, task = character_model.make_model(thought_temperature=1.0), load("gsm8k")
    state = torch.random.get_rng_state()
    model.train()
    first, again, other = (answer_probabilities(model, tokenizer, task, seed=seed).values for seed in (1, 1, 2))
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gsm8k",
            r"answer must be made of valid tokens, got '<unk>' in ' 3\\n' of line 1 of .*cannot express the task",
        ),
        ("commonsense_qa", "tokenizer must have a token for the answer 'A', got none in 'A: A'"),
        ("qa", "answer must be made of valid tokens, got '<unk>' in ' in' of line 1 of"),
    ],
)
def test_a_tokenizer_that_cannot_express_the_task_is_refused(tmp_path, load, name, message):
    words = AutoTokenizer.from_pretrained(word_model.save(tmp_path / "words"))
    with pytest.raises(ValueError, match=message):
        answer_probabilities(character_model.make_model(), words, load(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"think": "often"}, "think must be 'always', 'never' or a threshold in nats >= 0, got 'often'"),
        ({"think": -1.0}, "think must be 'always', 'never' or a threshold in nats >= 0, got -1.0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"seed": -1}, r"seed must be an integer in \[0, 4294967295\], got -1"),
        ({"max_length": 1}, "max_length must be an integer >= 2, got 1"),
    ],
)
def test_bad_arguments_are_named(tokenizer, load, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        answer_probabilities(character_model.make_model(), tokenizer, load("qa"), **options)
