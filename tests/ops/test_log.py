"""QUIETSTAR_LOG=1: which op, shapes, the backend that runs it, and why not a better one; every line once."""

import logging

import pytest
import torch

from quietstar.ops import _log, linear_sample, mix_logits, thought_attention


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(_log, "_said", set())
    monkeypatch.setenv("QUIETSTAR_LOG", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("QUIETSTAR_BACKEND", raising=False)


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="quietstar.ops")
    return lambda: [record.getMessage() for record in caplog.records]


def sample(rows: int = 2, **options) -> None:
    linear_sample(torch.zeros(rows, 4), torch.zeros(8, 4), seed=0, **options)


def test_a_line_says_op_shapes_backend_and_why_not_a_better_one(lines):
    sample(backend="triton,torch")
    (line,) = lines()
    assert line.startswith("linear_sample(hidden [2, 4] float32, weight [8, 4]) on cpu runs 'torch'; 'triton' cannot: ")


def test_every_line_comes_once(lines):
    for rows in (2, 2, 3, 2):
        sample(rows, backend="torch")
    assert len(lines()) == 2


def test_optional_inputs_are_shown_when_given(lines):
    query, key = torch.zeros(1, 2, 3, 1, 4), torch.zeros(1, 1, 5, 4)
    own = torch.zeros(1, 1, 3, 1, 4)
    thought_attention(query, key, key, own, own, anchors=torch.arange(3), backend="torch")
    (line,) = lines()
    assert "query [1, 2, 3, 1, 4] float32, key [1, 1, 5, 4], " in line
    assert "anchors [3] int64" in line
    assert "key_start" not in line


@pytest.mark.parametrize("value", ["", "0", "off"])
def test_nothing_is_said_unless_asked_for(lines, monkeypatch, value):
    monkeypatch.setenv("QUIETSTAR_LOG", value)
    sample()
    assert lines() == []


def test_without_handlers_lines_go_to_stderr(capsys, monkeypatch):
    logger = logging.Logger("alone")
    monkeypatch.setattr(_log, "_logger", logger)
    sample(backend="torch")
    assert capsys.readouterr().err.startswith("quietstar: linear_sample(")


def test_compiled_calls_say_their_choice_and_stay_whole(lines):
    logits = torch.zeros(2, 8)
    torch.compile(mix_logits, fullgraph=True, backend="eager")(logits, logits, torch.zeros(2), backend="torch")
    assert lines() == ["mix_logits(), compiled, runs 'torch'"]
