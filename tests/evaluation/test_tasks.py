"""Questions from files, and answers from what is said."""

import json

import character_model
import pytest
from datasets import Dataset
from questions import COMMONSENSE_QA, GSM8K, QA, ROWS, write

from quietstar.evaluation import load_task


@pytest.fixture
def load(tmp_path):
    return lambda name, rows=None, **options: load_task(
        name, write(tmp_path / "data.jsonl", ROWS[name] if rows is None else rows), **options
    )


def test_questions_are_put_as_in_the_paper(load):
    numbers = load("gsm8k").questions
    assert [question.answer for question in numbers] == ["3", "1072", "-5", "7.5"]
    assert numbers[1].prompt + numbers[1].continuation == "Q: How many?\nA: 1,072\n"
    letters = load("commonsense_qa").questions
    assert letters[0].prompt == "Q: Where?\n(A) a\n(B) b\n(C) see\n(D) d\n(E) e\nA:"
    assert (letters[0].continuation, letters[0].answer) == (" C\n", "C")
    own = load("qa").questions
    assert own[0].prompt + own[0].continuation == "Kim is in"
    assert len(load("gsm8k", limit=2).questions) == 2


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("gsm8k", " 72\nQ: 5", "72"),
        ("gsm8k", " is $1,072.50.", "1072.5"),
        ("gsm8k", "\n-0.5 or 3", "-0.5"),
        ("gsm8k", " 100.0", "100"),
        ("gsm8k", " many\n3", None),
        ("gsm8k", "", None),
        ("commonsense_qa", " (C) see\n", "C"),
        ("commonsense_qa", " Be B.", "B"),
        ("commonsense_qa", " F", None),
        ("qa", " in.", "in"),
        ("qa", " inn", None),
        ("qa", "out. ", "out."),
        ("qa", " is in", None),
    ],
)
def test_what_is_read_from_text(load, name, text, answer):
    assert load(name).extract(text) == answer


def test_the_valid_tokens_are_those_of_the_authors(load):
    tokenizer = character_model.make_tokenizer()

    def valid(name):
        return set(tokenizer.convert_ids_to_tokens(sorted(load(name).valid_tokens(tokenizer))))

    assert valid("gsm8k") == set("0123456789\n")
    assert valid("commonsense_qa") == set("ABCDE\n")
    assert valid("qa") == set(" in") | set(" out.")


def test_a_dataset_by_name(monkeypatch):
    asked = []

    def load_dataset(*arguments, split):
        asked.append((*arguments, split))
        return Dataset.from_list(COMMONSENSE_QA if "commonsense" in arguments[0] else GSM8K)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_task("gsm8k").source == "openai/gsm8k"
    assert load_task("commonsense_qa", limit=1).questions[0].answer == "C"
    assert load_task("gsm8k", "somebody/numbers").questions[1].place == "row 2 of somebody/numbers"
    assert asked == [
        ("openai/gsm8k", "main", "test"), ("tau/commonsense_qa", None, "validation"), ("somebody/numbers", None, "test")
    ]  # fmt: skip


LETTER = COMMONSENSE_QA[0]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("gsm8k", [], "data must hold at least one question, got none in"),
        (
            "gsm8k",
            [GSM8K[0], {"question": "1"}],
            r"columns question, answer, got no 'answer' in line 2 of .*data.jsonl",
        ),
        ("gsm8k", [{"text": "1"}], "got no 'question', 'answer' in line 1"),
        ("commonsense_qa", [GSM8K[0]], "columns question, choices, answerKey, got no 'choices', 'answerKey' in line 1"),
        ("qa", [QA[0] | {"answer": " "}], "answer must be text that is not empty, got ' ' in line 1"),
        ("qa", [QA[0] | {"question": 3}], "question must be text that is not empty, got 3 in line 1"),
        ("gsm8k", [GSM8K[0] | {"answer": "#### seven"}], "answer must be a number, .*, got 'seven' in line 1"),
        ("gsm8k", [GSM8K[0] | {"answer": "7 apples"}], "answer must be a number, .*, got '7 apples' in line 1"),
        ("commonsense_qa", [LETTER | {"answerKey": "F"}], "answerKey must be one of A, B, C, D, E, got 'F' in line 1"),
        ("commonsense_qa", [LETTER | {"answerKey": ""}], "answerKey must be text that is not empty, got '' in line 1"),
        ("commonsense_qa", [LETTER | {"choices": ["a"]}], "choices must hold the lists 'label' and 'text'"),
        (
            "commonsense_qa",
            [LETTER | {"choices": {"label": ["1"], "text": ["a"]}}],
            "choices must be labelled with letters of ABCDE",
        ),
        (
            "commonsense_qa",
            [LETTER | {"choices": {"label": ["A", "B"], "text": ["a"]}}],
            "choices must be labelled with letters of ABCDE, a text each",
        ),
    ],
)
def test_bad_rows_are_named(load, name, rows, message):
    with pytest.raises(ValueError, match=message):
        load(name, rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "a", "answer": "b"}\n{"question"\n', "JSON Lines in UTF-8, got in line 2 of"),
        (b"[1]\n", "an object per line, got a list in line 1 of"),
        (b"null\n3\n", "an object per line, got a int in line 2 of"),
        (b'{"question": "\xff"}\n', "JSON Lines in UTF-8, got in line 1 of"),
        (b"", "at least one question, got none in"),
        (b"\n \n", "at least one question, got none in"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_task("qa", tmp_path / "data.jsonl")


def test_a_byte_order_mark_and_empty_lines_are_no_matter(tmp_path):
    (tmp_path / "data.jsonl").write_text("\ufeff" + json.dumps(QA[0]) + "\n\n" + json.dumps(QA[1]) + "\n")
    assert [question.place[:6] for question in load_task("qa", tmp_path / "data.jsonl").questions] == [
        "line 1",
        "line 3",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mmlu"], "task must be one of gsm8k, commonsense_qa, qa, got 'mmlu'"),
        (["qa"], "data must be given for the task qa"),
        (["qa", "nowhere.jsonl"], "data must be a JSON Lines file or the name of a dataset, got no file at nowhere"),
        (["qa", "/"], "data must be a JSON Lines file or the name of a dataset, got a folder at /"),
        (["gsm8k", None, 0], "limit must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_task(*arguments)


def test_a_dataset_that_cannot_be_read_is_named(monkeypatch):
    def load_dataset(*arguments, split):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError, match="from the dataset openai/gsm8k, split test: ConnectionError: no network"):
        load_task("gsm8k")
