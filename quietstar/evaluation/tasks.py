"""Questions with known answers, from files or the hub: their prompts, and the parsing of answers from text."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from quietstar._numbers import Interval

_DIGITS = frozenset("0123456789")
_NUMBER = r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_SPACES = "▁Ġ "  # characters that vocabularies use for a space before a word


class Question(NamedTuple):
    """A question as a text to be continued."""

    prompt: str  # "Q: ...\nA:"
    continuation: str  # the right continuation, such as " 72\n"
    answer: str  # the answer as ``Task.extract`` parses it
    place: str  # where the question comes from, for messages


class Task(ABC):
    """Questions of one kind.

    Attributes:
        questions: the questions, at least one.
        source: the file or the name of the dataset.
    """

    name: str
    hub: tuple[str, str | None, str] | None = None  # name, configuration and split of the dataset
    columns: tuple[str, ...] = ("question", "answer")
    # Prompts for reasoning and then for the answer (arXiv 2205.11916); None: answers are given without reasoning.
    reason_cue: str | None = " Let's think step by step."
    answer_cue: str | None = None
    answer_tokens: int | None = 12  # tokens that an answer may take; None: those of the task's longest answer

    def __init__(self, rows: Iterable[tuple[str, dict]], source: str):
        self.source = source
        self.questions = [self._checked(place, row) for place, row in rows]
        if not self.questions:
            raise ValueError(f"data must hold at least one question, got none in {source}")

    def _checked(self, place: str, row: dict) -> Question:
        lacking = [repr(name) for name in self.columns if row.get(name) is None]
        if lacking:
            raise ValueError(
                f"data must have the columns {', '.join(self.columns)}, got no {', '.join(lacking)} in {place}"
            )
        for name in ("question", self.columns[-1]):
            if not isinstance(row[name], str) or not row[name].strip():
                raise ValueError(f"{name} must be text that is not empty, got {row[name]!r} in {place}")
        return self.read(row, place)

    @abstractmethod
    def read(self, row: dict, place: str) -> Question:
        """Create the question of a row, which has all columns."""

    @abstractmethod
    def extract(self, text: str) -> str | None:
        """Parse the answer at the beginning of the text after the prompt; None if there is none."""

    @abstractmethod
    def valid_tokens(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """Return the tokens that answers consist of, including the newline if it ends them."""

    def may_skip(self, token: str) -> bool:
        """Whether a token that is not valid may occur in an answer; it does not count then."""
        return not token.strip(_SPACES)


class Gsm8k(Task):
    """Word problems whose answers are numbers (arXiv 2110.14168)."""

    name = "gsm8k"
    hub = "openai/gsm8k", "main", "test"
    answer_cue = "\nTherefore, the answer (arabic numerals) is"

    def read(self, row: dict, place: str) -> Question:
        final = row["answer"].split("####")[-1].strip()
        if not re.fullmatch(_NUMBER, final):
            raise ValueError(f"answer must be a number, alone or behind '####', got {final!r} in {place}")
        return Question(f"Q: {row['question']}\nA:", f" {final}\n", self.extract(final), place)

    def extract(self, text: str) -> str | None:
        found = re.search(_NUMBER, _first_line(text))
        return f"{Decimal(found[0].replace(',', '')).normalize():f}" if found else None

    def valid_tokens(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        return {
            i for token, i in tokenizer.get_vocab().items() if (text := token.lstrip(_SPACES)) and set(text) <= _DIGITS
        } | _newline(tokenizer)

    def may_skip(self, token: str) -> bool:
        return not token.strip(_SPACES + ",.-")


class CommonsenseQa(Task):
    """Questions with five choices (arXiv 1811.00937)."""

    name = "commonsense_qa"
    hub = "tau/commonsense_qa", None, "validation"
    columns = "question", "choices", "answerKey"
    answer_cue = "\nTherefore, among A through E, the answer is"
    letters = "ABCDE"

    def read(self, row: dict, place: str) -> Question:
        choices = row["choices"]
        if not isinstance(choices, dict) or not all(isinstance(choices.get(part), list) for part in ("label", "text")):
            raise ValueError(f"choices must hold the lists 'label' and 'text', got {choices!r} in {place}")
        labels, texts = choices["label"], choices["text"]
        if len(labels) != len(texts) or not labels or not all(label in list(self.letters) for label in labels):
            raise ValueError(
                f"choices must be labelled with letters of {self.letters}, a text each, got {choices!r} in {place}"
            )
        answer = row["answerKey"].strip()
        if answer not in labels:
            raise ValueError(f"answerKey must be one of {', '.join(labels)}, got {answer!r} in {place}")
        listed = "\n".join(f"({label}) {text}" for label, text in zip(labels, texts, strict=True))
        return Question(f"Q: {row['question']}\n{listed}\nA:", f" {answer}\n", answer, place)

    def extract(self, text: str) -> str | None:
        found = re.search(rf"\b[{self.letters}]\b", _first_line(text))
        return found[0] if found else None

    def valid_tokens(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        valid = set()
        for letter in self.letters:
            ids = tokenizer(f"A: {letter}\n", add_special_tokens=False)["input_ids"]
            matching = [i for i in ids[1:] if tokenizer.convert_ids_to_tokens(i).strip(_SPACES) == letter]
            if not matching:
                raise ValueError(f"tokenizer must have a token for the answer {letter!r}, got none in 'A: {letter}'")
            valid.add(matching[-1])
        return valid | _newline(tokenizer)


class Qa(Task):
    """Any questions, continued by their answers unchanged; the valid answers are those in the file."""

    name = "qa"
    reason_cue = None
    answer_tokens = None

    def read(self, row: dict, place: str) -> Question:
        question, answer = row["question"], row["answer"].strip()
        return Question(question, f" {answer}" if question == question.rstrip() else answer, answer, place)

    def extract(self, text: str) -> str | None:
        said = text.lstrip()
        behind = ((answer, said[len(answer) :]) for answer in self._answers() if said.startswith(answer))
        whole = (answer for answer, rest in behind if not (rest[:1].isalnum() and answer[-1].isalnum()))
        return max(whole, key=len, default=None)

    def valid_tokens(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        return {i for question in self.questions for i in answer_ids(tokenizer, question)[1]} - {tokenizer.unk_token_id}

    def _answers(self) -> set[str]:
        return {question.answer for question in self.questions}


TASKS: dict[str, type[Task]] = {task.name: task for task in (Gsm8k, CommonsenseQa, Qa)}


def load_task(name: str, data: str | Path | None = None, limit: int | None = None) -> Task:
    """Load the questions of a task.

    Args:
        name: ``"gsm8k"``, ``"commonsense_qa"``, or ``"qa"`` for any ``question`` and ``answer``.
        data: a JSON Lines file with the columns of the task's dataset (``question`` and ``answer``, or ``question``,
            ``choices`` and ``answerKey``), or the name of a dataset. Default: the task's own dataset on the hub.
        limit: use only the first ``limit`` questions. Default: all.

    Raises:
        TypeError, ValueError: the task or limit is invalid, the data does not exist or is empty, or a row lacks a
            column or has an invalid answer (the message names the line).
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    if limit is not None:
        Interval(int, "[1, inf)").check("limit", limit)
    task = TASKS[name]
    if data is None and task.hub is None:
        raise ValueError(f"data must be given for the task {name}")
    path = None if data is None else Path(data)
    if path is not None and (path.exists() or path.suffix in (".jsonl", ".json") or path.is_absolute()):
        rows, source = _lines(path), str(path)
    else:
        own, configuration, split = task.hub or (None, None, "test")
        source = own if data is None else str(data)
        rows = _hub_rows(source, configuration if source == own else None, split)
    return task(islice(rows, limit), source)


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield the rows of a JSON Lines file, each with its place."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no file"
        raise ValueError(f"data must be a JSON Lines file or the name of a dataset, got {found} at {path}")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"line {number} of {path}"
            try:
                text = line.decode("utf-8-sig")
                row = json.loads(text) if text.strip() else None
            except ValueError as error:
                raise ValueError(f"data must be JSON Lines in UTF-8, got in {place}: {error}") from error
            if row is not None and not isinstance(row, dict):
                raise ValueError(f"data must hold an object per line, got a {type(row).__name__} in {place}")
            if row is not None:
                yield place, row


def _hub_rows(name: str, configuration: str | None, split: str) -> Iterator[tuple[str, dict]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, configuration, split=split)
    except Exception as error:  # formats and the network raise many kinds of errors
        raise ValueError(
            f"data cannot be read from the dataset {name}, split {split}: {type(error).__name__}: {error}"
        ) from error
    return ((f"row {number} of {name}", row) for number, row in enumerate(rows, 1))


def answer_ids(tokenizer: PreTrainedTokenizerBase, question: Question) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt and of the right answer after it; the text is tokenised as a whole."""
    prompt, whole = tokenizer([question.prompt, question.prompt + question.continuation])["input_ids"]
    shared = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    answer = whole[shared:]
    if answer[-1:] == [tokenizer.eos_token_id]:
        answer = answer[:-1]
    return whole[:shared], answer


def _newline(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the token of the newline after an answer; empty if the tokenizer drops it."""
    last = tokenizer("A: 1\n", add_special_tokens=False)["input_ids"][-1:]
    return set(last) if tokenizer.decode(last) == "\n" else set()


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0]
