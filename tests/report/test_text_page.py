"""What a page says of a text."""

import json
import math

import pytest
import torch

from quietstar.evaluation import Mean, gain, gain_by_difficulty
from quietstar.report import plots
from quietstar.report.reading import read
from quietstar.report.text_page import (
    OWN_DIFFICULTY,
    Source,
    figures,
    number,
    signed,
    text_page,
    training_history,
    verdict,
    with_error,
)


@pytest.mark.parametrize(
    ("own", "over_shuffled", "words"),
    [
        (Mean(0.1, 0.01), Mean(0.08, 0.01), "0.1000 nats per token better (± 0.0100). What they say matters"),
        (Mean(0.1, 0.01), Mean(0.01, 0.01), "it is not what they say"),
        (Mean(-0.1, 0.01), Mean(0.5, 0.01), "0.1000 nats per token worse (± 0.0100): here they do harm"),
        (Mean(0.01, 0.006), Mean(0.5, 0.01), "changed nothing here to speak of: +0.0100 ± 0.0060"),
        (Mean(1e-5, 1e-7), Mean(1e-5, 1e-7), "changed nothing here to speak of: 0.0000 ± 0.0000"),
        (Mean(0.1, math.nan), Mean(0.5, math.nan), "an observation, not a finding"),
    ],
)
def test_verdict(own, over_shuffled, words):
    assert words in verdict(own, over_shuffled)


def test_numbers_have_real_signs_and_zero_has_none():
    assert [number(-1.5), number(-1e-9), signed(0.25, 2), signed(-0.25, 2), signed(-1e-9)] == [
        "−1.5000", "0.0000", "+0.25", "−0.25", "0.0000"
    ]  # fmt: skip
    assert with_error(Mean(0.5, 0.1)) == "+0.5000 ± 0.1000"
    assert with_error(Mean(0.5, math.nan)) == "+0.5000"


def page(model, tokenizer, windows, lengths=(), difficulty=None, history=()):
    reading = read(model, windows, seed=0, thought_lengths=lengths)
    source = Source("title", ["note"], 3, difficulty, history, [("Command", "x")])
    return reading, text_page(tokenizer, reading, source, joined=False)


def test_the_table_holds_every_control(model, tokenizer):
    reading, made = page(model, tokenizer, torch.randint(1, 281, (3, 20)), lengths=[1])
    own = gain(reading.own)
    assert made.cards[0].value == f"{own.base.value:.3f}"
    rows = {row.name: row for row in made.table.rows}
    assert [name for name, row in rows.items() if row.main] == ["after its own thoughts"]
    for name, nll in {
        "after its own thoughts": reading.own,
        "after thoughts of other places (shuffled)": reading.shuffled,
        "after random tokens for thoughts": reading.random,
        "after thoughts of 1 tokens": reading.lengths[1],
    }.items():
        measured = gain(nll)
        assert rows[name].cells == [number(measured.mixed.value), with_error(measured.gain)]
    alone = rows["… by the thought's prediction alone"].cells
    assert alone == [number(own.thought.value), with_error(gain(reading.own._replace(mixed=reading.own.thought)).gain)]
    assert rows["without thoughts"].cells[0] == number(own.base.value)
    assert "57 tokens" in made.table.note
    assert "3 windows" in made.table.note


def test_figures_are_those_that_there_is_something_to_draw_for(model, tokenizer):
    history = [{"step": step, "base_nll": 1.0, "talk_nll_0": 1.0} for step in (1, 2)]
    windows = torch.randint(1, 281, (2, 20))
    _, made = page(model, tokenizer, windows, [0, 1], difficulty=torch.rand(2, 19), history=history)
    assert [figure.title for figure in made.figures] == [
        "Gain by difficulty", "Thought length", "Weight of the thoughts", "Training"
    ]  # fmt: skip
    assert "from before Quiet-STaR, so that no" in made.figures[0].note
    assert [f"{length} tokens" in made.figures[1].svg for length in range(5)] == [True, True, False, True, False]
    _, made = page(model, tokenizer, windows)
    assert [figure.title for figure in made.figures] == ["Gain by difficulty", "Weight of the thoughts"]
    assert "flatters" in made.figures[0].note
    _, made = page(model, tokenizer, windows[:1, :5])
    assert [figure.title for figure in made.figures] == ["Weight of the thoughts"]
    assert "No error: there is one window" in made.table.note


def test_tenths_are_of_the_tokens_that_count(model):
    windows = torch.randint(1, 281, (2, 21))
    counted = torch.arange(20).expand(2, 20) >= 10
    reading = read(model, windows, counted, seed=0)
    expected = plots.deciles(gain_by_difficulty(reading.own, reading.own.base, 10, counted), OWN_DIFFICULTY)
    assert figures(reading, None, [], None)[0] == expected


def test_what_training_logged(tmp_path):
    assert training_history(str(tmp_path)) == training_history("no/folder") == []
    for step in (5, 10):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step}]}))
    assert training_history(str(tmp_path)) == [{"step": 10}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 11}]}))
    assert training_history(str(tmp_path)) == [{"step": 11}]
