"""A world in which thinking helps: people, their relations, and questions that chain several relations.

"Ann's boss is Eli." is a fact. "Ann's boss's aunt's tutor is" asks for three facts in a row, more than one layer of
attention can look up at once, so the answer needs the people in between. Some documents spell them out between dashes
("is --- Eli Kim --- Sue."), some have an idle aside there ("is --- well oh --- Sue."), and some answer immediately.
This is the paper's idea: text leaves out steps that its author had in mind.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PEOPLE = ["Ann", "Ben", "Cem", "Dora", "Eli", "Fay", "Gus", "Hana", "Ian", "Jo"]
PEOPLE += ["Kim", "Leo", "Mia", "Ned", "Ola", "Pia", "Quin", "Ray", "Sue", "Tom"]
RELATIONS = ["boss", "friend", "aunt", "tutor", "rival", "guest"]
ASIDES = ["well", "hm", "oh", "so", "now", "then", "look", "see"]
HELD_OUT_SHARE, MOST_HELD_OUT = 0.25, 800


class Question(NamedTuple):
    """A person and the relations to follow from that person."""

    person: str
    relations: tuple[str, ...]

    def __str__(self) -> str:
        return "".join([self.person, *(f"'s {relation}" for relation in self.relations), " is"])


class Shares(NamedTuple):
    """The share of each kind of document; their sum is 1."""

    fact: float
    terse: float  # a question answered immediately
    worked: float = 0.0  # a question with the people in between, between dashes
    aside: float = 0.0  # a question with something idle between dashes


class Windows(NamedTuple):
    """Windows of text, and which of their tokens are answers."""

    tokens: np.ndarray  # int64 [windows, L]
    answers: np.ndarray  # bool [windows, L], whether a token answers a question (of whole length, not a fact)


class World:
    """People and their relations (boss, friend, ...), each of which is a random permutation of the people.

    Args:
        hops: relations in a question.
        seed: seed of the relations and of the choice of questions held out of all training text.
        people: number of people, at most ``len(PEOPLE)``.
    """

    def __init__(self, hops: int, seed: int, people: int = len(PEOPLE)):
        rng = np.random.default_rng(seed)
        self.hops, self.people = hops, PEOPLE[:people]
        self.of = {
            relation: dict(zip(self.people, rng.permutation(self.people).tolist(), strict=True))
            for relation in RELATIONS
        }
        questions = [Question(person, chain) for person in self.people for chain in product(RELATIONS, repeat=hops)]
        order = rng.permutation(len(questions))
        count = min(MOST_HELD_OUT, round(HELD_OUT_SHARE * len(questions)))
        self.held_out = [questions[i] for i in order[:count]]
        self.train = [questions[i] for i in order[count:]]

    def steps(self, question: Question) -> list[str]:
        """Return the person that each relation leads to; the last one is the answer."""
        person, steps = question.person, []
        for relation in question.relations:
            person = self.of[relation][person]
            steps.append(person)
        return steps

    def document(self, rng: np.random.Generator, shares: Shares, questions: Sequence[Question]) -> tuple[str, bool]:
        """Create a random document, and return whether it answers one of ``questions``."""
        kind = shares._fields[rng.choice(len(shares), p=shares)]
        if kind == "fact":
            question = Question(self.people[rng.integers(len(self.people))], (RELATIONS[rng.integers(len(RELATIONS))],))
        else:
            question = questions[rng.integers(len(questions))]
        *between, answer = self.steps(question)
        if kind == "aside":
            between = rng.choice(ASIDES, len(between)).tolist()
        spelled = f" --- {' '.join(between)} ---" if kind in ("worked", "aside") else ""
        return f"{question}{spelled} {answer}.", kind != "fact"

    def windows(
        self, tokenizer: PreTrainedTokenizerFast, count: int, length: int, shares: Shares,
        questions: Sequence[Question], rng: np.random.Generator,
    ) -> Windows:  # fmt: skip
        """Create ``count`` windows of ``length`` tokens, each beginning with a whole document."""
        tokens, answers = [], []
        for _ in range(count):
            window, marks = [], []
            while len(window) < length:
                text, answered = self.document(rng, shares, questions)
                ids = tokenizer(text)["input_ids"]
                window += ids
                marks += [False] * (len(ids) - 2) + [answered, False]  # the full stop follows the answer
            tokens.append(window[:length])
            answers.append(marks[:length])
        return Windows(np.array(tokens), np.array(answers))


def world_tokenizer() -> PreTrainedTokenizerFast:
    """Create a tokenizer with one token per word of the world, including ``'s friend`` and the like."""
    words = ["<eos>", "<unk>", "is", "---", ".", *ASIDES, *PEOPLE, *(f"'s {relation}" for relation in RELATIONS)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"'s \w+|---|\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # a space between words, none before ' and .
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
