"""The prompts: questions, worked examples before them, and answers as hints."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from quietstar.evaluation import Task

_BLANK_LINE = "\n\n"
_FIELDS = re.compile(r"\{(question|answer)\}")


class Problem(NamedTuple):
    """A question with its answer."""

    question: str  # the question alone, without the text that a format adds
    answer: str  # the answer as the task parses it
    place: str  # where the question comes from, for messages


class Example(NamedTuple):
    """A worked example."""

    question: str
    worked: str  # rationale, separator and answer, as they follow the question
    answer: str


@dataclass(frozen=True)
class Format:
    """The format of a question, followed by its rationale and its answer.

    Args:
        template: template of a question; its rationale follows it.
        hint: template of a question with its answer as a hint.
        separator: text between rationale and answer; if it occurs several times, the last one counts.
        stop: text that ends an answer.

    Raises:
        ValueError: a text lacks a field or is empty; the message names it.
    """

    template: str = "Q: {question}\nA:"
    hint: str = "{question} ({answer})"
    separator: str = "The answer is"
    stop: str = _BLANK_LINE

    def __post_init__(self):
        for name, fields in (("template", ["question"]), ("hint", ["answer", "question"])):
            if sorted(_FIELDS.findall(getattr(self, name))) != fields:
                wanted = " and ".join(f"{{{field}}}" for field in reversed(fields))
                raise ValueError(f"{name} must hold {wanted} once, got {getattr(self, name)!r}")
        if not self.template.partition("{question}")[2].strip():
            raise ValueError(
                f"template must have text behind {{question}}, where the rationale begins, got {self.template!r}"
            )
        if not self.separator.strip():
            raise ValueError(f"separator must be text that is not empty, got {self.separator!r}")
        if not self.stop:
            raise ValueError("stop must be text that is not empty, got ''")

    def prompt(self, question: str, hint: str | None = None) -> str:
        """Return the question as a text to be continued, with its answer as a ``hint`` if given."""
        if hint is not None:
            question = _filled(self.hint, question=question, answer=hint)
        return _filled(self.template, question=question)

    def few_shot(self, examples: Sequence[Example], hints: bool) -> str:
        """Return worked examples to put before a prompt; with hints if the prompt has one."""
        parts = (self.prompt(each.question, each.answer if hints else None) + each.worked for each in examples)
        return "".join(part + _BLANK_LINE for part in parts)

    def split(self, said: str) -> tuple[str, str] | None:
        """Split the text after a prompt into rationale and answer; None if the separator is missing."""
        rationale, found, answer = said.partition(self.stop)[0].rpartition(self.separator)
        return (rationale.strip(), answer.strip()) if found else None

    def question(self, text: str) -> str:
        """Return the question alone from a text that is a question or already has the form of ``prompt``."""
        before, after = self.template.split("{question}")
        inside = text.removeprefix(before).removesuffix(after)
        return inside if self.prompt(inside) == text else text

    def example(self, text: str, name: str) -> Example:
        """Parse a worked example.

        Raises:
            ValueError: it does not have this format; the message calls it ``name``.
        """
        before, after = map(re.escape, self.template.split("{question}"))
        match = re.fullmatch(f"{before}(.+?){after}(.+)", text, re.DOTALL)
        if match is None:
            raise ValueError(f"{name} must be written like the template {self.template!r}, got {text!r}")
        question, worked = match.groups()
        parts = self.split(worked)
        if parts is None or not all(parts):
            missing = "no separator" if parts is None else f"no {'answer' if parts[0] else 'rationale'}"
            raise ValueError(
                f"{name} must have a rationale, the separator {self.separator!r} and an answer behind its question, "
                f"got {missing} in {text!r}"
            )
        end = (worked + _BLANK_LINE).find(self.stop)
        if end < 0 or end + len(self.stop) < len(worked):
            found = "none" if end < 0 else "it earlier"
            raise ValueError(f"{name} must end with the stop text {self.stop!r}, got {found} in {text!r}")
        return Example(question, worked, parts[1].removesuffix("."))


def read_examples(file: str | PathLike, form: Format) -> list[Example]:
    """Read worked examples, separated by blank lines, from a text file.

    Raises:
        ValueError: the file does not exist, is not UTF-8 text, or has an example that does not have the format (the
            message gives its number).
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"few_shot must be a text file of worked examples, got no file at {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"few_shot must be text in UTF-8, got {path}: {error}") from error
    texts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    if not texts:
        raise ValueError(f"few_shot must hold at least one worked example, got none in {path}")
    return [form.example(text, f"few_shot example {number} of {path}") for number, text in enumerate(texts, 1)]


def problems_of(task: Task, form: Format) -> list[Problem]:
    """Return the questions of a task without the text that its prompts add."""
    return [Problem(form.question(each.prompt), each.answer, each.place) for each in task.questions]


def _filled(template: str, **fields: str) -> str:
    """Fill in all fields of a template in one pass, so that fields in the inserted text are not filled."""
    return _FIELDS.sub(lambda field: fields[field[1]], template)
