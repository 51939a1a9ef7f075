"""The quickstart's page says what was measured."""

import numpy as np
import pytest
import torch

from quietstar.quickstart.controls import OTHER_LENGTH
from quietstar.quickstart.measures import described_questions, measure
from quietstar.quickstart.page import percent, world_page
from quietstar.quickstart.world import Shares
from quietstar.report.reading import read

HISTORY = [{"step": step, "base_nll": 1.0, "talk_nll_0": 1.0} for step in (1, 2)]


@pytest.fixture
def held_out(world, tokenizer):
    return world.windows(tokenizer, 10, 40, Shares(0.4, 0.6), world.held_out, np.random.default_rng(0))


@pytest.fixture
def results(model, world, exam, tokenizer, held_out):
    measured, own = measure(model, exam, held_out)
    fixed = {"people": 4, "hops": 3, "thought_length": 2}
    return fixed | measured | {"questions": described_questions(world, exam, own, tokenizer)}


@pytest.fixture
def page_of(model, tokenizer, held_out):
    windows = torch.from_numpy(held_out.tokens)
    reading = read(model, windows, seed=0)
    return lambda results: world_page(tokenizer, results, reading, reading.own.base, HISTORY, [("Seed", "0")])


def test_numbers_are_those_of_the_results(page_of, results):
    page = page_of(results)
    rows = {row.name: row for row in page.table.rows}
    kinds = {"without": "without thoughts", "with": "after a thought", "shuffled": "after another question's thought"}
    for (kind, name), card in zip(kinds.items(), page.cards, strict=False):
        accuracy, error = results[f"accuracy_{kind}"], results[f"accuracy_{kind}_error"]
        nll, nll_error = results[f"nll_{kind}"], results[f"nll_{kind}_error"]
        assert rows[name].cells == [f"{percent(accuracy)} ± {100 * error:.1f}", f"{nll:.3f} ± {nll_error:.3f}"]
        assert rows[name].share == accuracy
        assert card.value == percent(accuracy)
    assert page.cards[3].value == "25.0 %"
    assert [row.name for row in page.table.rows if row.main] == ["after a thought"]
    assert len(page.questions) == len(page.view.blocks) == 8
    for question, known in zip(page.questions, results["questions"], strict=False):
        assert question.right == (known["said"] == known["answer"])
    assert [figure.title for figure in page.figures] == ["Gain by difficulty", "Weight of the thoughts", "Training"]


@pytest.mark.parametrize(("after", "tone"), [(0.9, "up"), (0.52, "")])
def test_only_what_is_more_than_the_error_looks_like_success(page_of, results, after, tone):
    changed = {"accuracy_without": 0.5, "accuracy_with": after}
    changed |= {"accuracy_without_error": 0.02, "accuracy_with_error": 0.02}
    assert page_of(results | changed).cards[1].tone == tone


def test_a_staircase_where_other_lengths_were_trained(page_of, results):
    controls = [
        {"name": OTHER_LENGTH.format(length), "accuracy": share, "accuracy_error": 0.01, "nll": 1.0, "nll_error": 0.1}
        for length, share in ((0, 0.05), (1, 0.1), (3, 0.99))
    ]
    page = page_of(results | {"controls": controls, "accuracy_with": 1.0})
    staircase = page.figures[1]
    assert (
        "answers right (%) after thoughts of 0 tokens: 5, 1 tokens: 10, 2 tokens: 100, 3 tokens: 99." in staircase.svg
    )
    assert [row.name for row in page.table.rows[3:]] == [control["name"] for control in controls]


def test_percentages():
    assert [percent(share) for share in (1, 0.9999, 0.0475, 0)] == ["100 %", "100.0 %", "4.8 %", "0.0 %"]
