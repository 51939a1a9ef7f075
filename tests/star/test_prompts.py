"""How questions, hints and examples are written and read."""

import pytest
from questions import ROWS, write

from quietstar.evaluation import load_task
from quietstar.star import Example, Format, problems_of, read_examples

GSM8K = Format(separator="####")
WORKED = "Q: 1 + 1?\nA: One and\none.\n#### 2"


def test_prompts_with_and_without_hint():
    example = GSM8K.example(WORKED, "it")
    assert example == Example("1 + 1?", " One and\none.\n#### 2", "2")
    assert GSM8K.prompt("{answer} or {question}?") == "Q: {answer} or {question}?\nA:"
    assert GSM8K.prompt("Why?", "{question}") == "Q: Why? ({question})\nA:"
    assert GSM8K.few_shot([example, example], hints=False) == f"{WORKED}\n\n{WORKED}\n\n"
    assert GSM8K.few_shot([example], hints=True) == "Q: 1 + 1? (2)\nA: One and\none.\n#### 2\n\n"


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        (" Two.\n#### 4", ("Two.", "4")),
        (" a #### 1 b #### 2\n\nQ: #### 3", ("a #### 1 b", "2")),  # the last one in front of the stop
        (" no\n\n#### 3", None),
        ("####", ("", "")),
    ],
)
def test_rationale_and_answer(said, parts):
    assert GSM8K.split(said) == parts


@pytest.mark.parametrize("name", ["gsm8k", "qa"])
def test_problems_are_the_bare_questions(tmp_path, name):
    """Whether or not the task's prompt is already written like the template."""
    problems = problems_of(load_task(name, write(tmp_path / "data.jsonl", ROWS[name])), GSM8K)
    assert [problem.question for problem in problems] == [row["question"] for row in ROWS[name]]
    assert [problem.answer for problem in problems][:2] == (["3", "1072"] if name == "gsm8k" else ["in", "out."])


def test_examples_are_separated_by_blank_lines(tmp_path):
    (tmp_path / "few.txt").write_text(f"\ufeff\n{WORKED}\n \n\n{WORKED.replace('2', '3.')}\n", encoding="utf-8")
    assert [example.answer for example in read_examples(tmp_path / "few.txt", GSM8K)] == ["2", "3"]


@pytest.mark.parametrize(
    ("text", "form", "message"),
    [
        (b"", GSM8K, "few_shot must hold at least one worked example, got none in"),
        (b"\xff", GSM8K, "few_shot must be text in UTF-8"),
        (WORKED.replace("Q: ", ""), GSM8K, r"few_shot example 1 of .* must be written like the template 'Q: "),
        (
            f"{WORKED}\n\nQ: a\nA: b",
            GSM8K,
            r"few_shot example 2 of .* the separator '####' .* got no separator in 'Q: a",
        ),
        ("Q: a\nA: #### 2", GSM8K, "got no rationale"),
        ("Q: a\nA: b ####", GSM8K, "got no answer"),
        (WORKED, Format(separator="####", stop="\n"), r"got no separator"),
        ("Q: a\nA: b. #### 2", Format(separator="####", stop=";"), "must end with the stop text ';', got none"),
        ("Q: a\nA: b #### 2; 3", Format(separator="####", stop=";"), "must end with the stop text ';', got it earlier"),
    ],
)
def test_bad_examples_are_named(tmp_path, text, form, message):
    (tmp_path / "few.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / "few.txt", form)


def test_no_file_of_examples(tmp_path):
    with pytest.raises(ValueError, match="few_shot must be a text file of worked examples, got no file at"):
        read_examples(tmp_path, GSM8K)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"template": "Q: A:"}, "template must hold {question} once"),
        ({"template": "{question} {question} is"}, "template must hold {question} once"),
        ({"template": "Q: {question}\n"}, "template must have text behind {question}"),
        ({"hint": "{question}"}, "hint must hold {question} and {answer} once"),
        ({"separator": " "}, "separator must be text"),
        ({"stop": ""}, "stop must be text"),
    ],
)
def test_bad_formats_are_named(texts, message):
    with pytest.raises(ValueError, match=message):
        Format(**texts)
