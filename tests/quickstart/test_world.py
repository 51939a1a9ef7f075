"""The world: relations, questions held out, and the text that is written about it."""

import re

import numpy as np
import pytest

from quietstar.quickstart.world import ASIDES, PEOPLE, RELATIONS, Question, Shares, World, world_tokenizer

QUESTION = re.compile(r"(\w+)((?:'s \w+)+) is(?: --- ([\w ]+) ---)? (\w+)\.")


def follow(world, person, relations):
    people = []
    for relation in relations:
        person = world.of[relation][person]
        people.append(person)
    return people


@pytest.mark.parametrize(("hops", "held_out"), [(2, 180), (3, 800), (4, 800)])
def test_questions_are_held_out_or_trained_on(hops, held_out):
    world = World(hops, seed=0)
    assert len(world.held_out) == held_out
    questions = world.held_out + world.train
    assert len(questions) == len(set(questions)) == len(PEOPLE) * len(RELATIONS) ** hops
    assert all(len(question.relations) == hops for question in questions)


def test_relations_are_permutations_and_the_seed_decides():
    world = World(3, seed=0)
    assert list(world.of) == RELATIONS
    for people in world.of.values():
        assert list(people) == PEOPLE
        assert sorted(people.values()) == PEOPLE
    assert (World(3, seed=0).of, World(3, seed=0).held_out) == (world.of, world.held_out)
    assert World(3, seed=1).of != world.of
    assert World(3, seed=1).held_out != world.held_out


def test_a_question_is_written_and_answered():
    world = World(3, seed=0)
    question = Question("Ann", ("boss", "aunt", "boss"))
    assert str(question) == "Ann's boss's aunt's boss is"
    boss, aunt = world.of["boss"], world.of["aunt"]
    assert world.steps(question) == [boss["Ann"], aunt[boss["Ann"]], boss[aunt[boss["Ann"]]]]


@pytest.mark.parametrize("kind", Shares._fields)
def test_documents_of_each_kind(kind):
    world, rng = World(3, seed=0), np.random.default_rng(0)
    shares = Shares(*(float(name == kind) for name in Shares._fields))
    for _ in range(30):
        text, answered = world.document(rng, shares, world.train)
        person, relations, spelled, answer = QUESTION.fullmatch(text).groups()
        relations = relations.removeprefix("'s ").split("'s ")
        steps = follow(world, person, relations)
        assert answer == steps[-1]
        assert answered == (kind != "fact")
        assert len(relations) == (1 if kind == "fact" else 3)
        if answered:
            assert Question(person, tuple(relations)) in world.train
        if kind == "aside":
            assert len(spelled.split()) == 2
            assert set(spelled.split()) <= set(ASIDES)
        else:
            assert spelled == (" ".join(steps[:-1]) if kind == "worked" else None)


@pytest.mark.parametrize("hops", [2, 3])
def test_windows_begin_with_a_document_and_know_their_answers(hops):
    world, tokenizer = World(hops, seed=0), world_tokenizer()
    shares = Shares(fact=0.3, terse=0.3, worked=0.2, aside=0.2)
    windows = world.windows(tokenizer, 20, 50, shares, world.train, np.random.default_rng(0))
    assert windows.tokens.shape == windows.answers.shape == (20, 50)
    for tokens, answers in zip(windows.tokens, windows.answers, strict=True):
        text, expected = tokenizer.decode(tokens), []
        assert QUESTION.match(text)
        for match in QUESTION.finditer(text):
            if match.group(2).count("'s") == hops:
                expected.append(match.group(4))
        found = [tokenizer.decode([token]) for token in tokens[answers]]
        assert found[: len(expected)] == expected  # and one more where the full stop is cut off
        assert len(found) - len(expected) == int(answers[-1])


def test_text_survives_the_tokenizer():
    world, tokenizer, rng = World(3, seed=0), world_tokenizer(), np.random.default_rng(0)
    text = " ".join(world.document(rng, Shares(0.25, 0.25, 0.25, 0.25), world.train)[0] for _ in range(40))
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.convert_ids_to_tokens(tokenizer("Ann's boss is Zoë!")["input_ids"]) == [
        "Ann", "'s boss", "is", "<unk>", "<unk>"
    ]  # fmt: skip
