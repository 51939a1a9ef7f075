"""Means over tokens and their errors, against plain loops and repeated draws."""

import math
from itertools import pairwise

import pytest
import torch

from quietstar.evaluation import (
    HeldOutNll,
    gain,
    gain_by_difficulty,
    gain_by_position,
    gain_by_token,
    hardest,
    token_mean,
)


@pytest.fixture
def nll():
    return HeldOutNll(*torch.rand(4, 6, 9), torch.zeros(6, 1, 10, 2, dtype=torch.int64))


def mean_by_hand(values, chosen):
    """Mean and error over windows of a ratio of sums, one window after the other."""
    count = int(chosen.sum())
    mean = sum(float(values[chosen][i]) for i in range(count)) / count
    squares = 0.0
    for row, which in zip(values.double(), chosen, strict=True):
        squares += (float(row[which].sum()) - mean * int(which.sum())) ** 2
    holding = sum(bool(which.any()) for which in chosen)
    return mean, math.sqrt(squares * len(values) / (len(values) - 1)) / count if holding > 1 else math.nan


def assert_gain(found, nll, chosen):
    assert found.tokens == chosen.sum()
    columns = {name: getattr(nll, name) for name in ("base", "mixed", "thought", "mixing_weight")}
    for name, values in (columns | {"gain": nll.base - nll.mixed}).items():
        assert getattr(found, name) == pytest.approx(mean_by_hand(values, chosen), rel=1e-5, nan_ok=True), name


def test_of_all_and_of_chosen_tokens(nll):
    assert_gain(gain(nll), nll, torch.ones(6, 9, dtype=torch.bool))
    chosen = torch.rand(6, 9) < 0.4
    assert_gain(gain(nll, chosen), nll, chosen)


def test_by_difficulty(nll):
    before = torch.arange(54.0)[torch.randperm(54)].reshape(6, 9)
    rows = gain_by_difficulty(nll, before, parts=4)
    bounds = [0, 14, 27, 41, 54]  # 13.5 tokens each
    assert len(rows) == 4
    for row, (low, high) in zip(rows, pairwise(bounds), strict=True):
        assert_gain(row, nll, (before >= low) & (before < high))
    assert [row.tokens for row in gain_by_difficulty(nll, torch.zeros(6, 9))] == [6, 5, 6, 5, 5, 6, 5, 6, 5, 5]


def test_by_difficulty_of_some_tokens(nll):
    before = torch.randperm(54).reshape(6, 9).float()
    chosen = before % 3 == 0  # 18 tokens
    rows = gain_by_difficulty(nll, before, parts=2, chosen=chosen)
    assert_gain(rows[0], nll, chosen & (before < 27))
    assert_gain(rows[1], nll, chosen & (before >= 27))
    with pytest.raises(ValueError, match=r"parts must be an integer in \[1, 18\], got 19"):
        gain_by_difficulty(nll, before, 19, chosen)


@pytest.mark.parametrize(("width", "count"), [(1, 9), (4, 3), (9, 1), (100, 1)])
def test_by_position(nll, width, count):
    rows = gain_by_position(nll, width)
    assert len(rows) == count
    for i, row in enumerate(rows):
        chosen = torch.zeros(6, 9, dtype=torch.bool)
        chosen[:, i * width : (i + 1) * width] = True
        assert_gain(row, nll, chosen)


def test_by_token(nll):
    windows = torch.randint(5, 12, (6, 10))
    windows[:, 0] = 99  # nothing predicts the first token
    windows[2, 4] = 50  # in a single window
    rows = gain_by_token(nll, windows)
    assert list(rows) == windows[:, 1:].unique().tolist()
    assert math.isnan(rows[50].gain.error)
    for token, row in rows.items():
        assert_gain(row, nll, windows[:, 1:] == token)


def test_hardest_tokens():
    nll = torch.arange(40.0).reshape(4, 10)[:, torch.randperm(10)]
    assert torch.equal(hardest(nll), nll >= 36)
    assert torch.equal(hardest(nll, 1.0), torch.ones(4, 10, dtype=torch.bool))
    assert hardest(nll, 1e-6).sum() == 1


@pytest.mark.parametrize("share", [0, -0.1, 1.01, math.nan, math.inf, True, "0.1", None])
def test_shares_that_are_none(share):
    with pytest.raises((TypeError, ValueError), match=r"share must be (a number )?(in \(0, 1\]|finite), got"):
        hardest(torch.ones(2, 2), share)


def test_the_hardest_of_nothing():
    with pytest.raises(ValueError, match=r"nll must hold at least one token, got shape \[0, 3\]"):
        hardest(torch.ones(0, 3))


def test_mean_of_all_tokens_has_the_error_of_the_window_means():
    values = torch.randn(50, 8)
    mean, error = token_mean(values)
    assert mean == pytest.approx(float(values.mean()), abs=1e-7)
    assert error == pytest.approx(float(values.mean(1).std() / 50**0.5))


def test_mean_of_chosen_tokens_and_its_error_over_repetitions():
    means, errors = [], []
    for _ in range(400):
        # Windows differ, so do their tokens, and so do the numbers of tokens that are chosen.
        values = 5 + torch.randn(40, 1) + torch.randn(40, 6)
        chosen = torch.rand(40, 6) < torch.rand(40, 1)
        mean, error = token_mean(values, chosen)
        assert mean == pytest.approx(float(values[chosen].mean()), abs=1e-6)
        means.append(mean)
        errors.append(error)
    # The spread of 400 means is known to 1 / sqrt(2·400) = 3.5 %; three of these, and the bias of order 1/40.
    assert torch.tensor(errors).mean() == pytest.approx(float(torch.tensor(means).std()), rel=0.13)


def test_a_single_window_has_no_known_error():
    values = torch.rand(1, 4)
    assert token_mean(values) == pytest.approx((float(values.mean()), math.nan), nan_ok=True)
    chosen = torch.tensor([[True] * 4, [False] * 4])
    assert token_mean(values.repeat(2, 1), chosen) == pytest.approx((float(values.mean()), math.nan), nan_ok=True)
    assert all(map(math.isnan, token_mean(values, torch.zeros(1, 4, dtype=torch.bool))))


@pytest.mark.parametrize(
    ("function", "argument", "message"),
    [
        (gain, torch.ones(6, 10).bool(), r"chosen must have the shape of nll, \[6, 9\], got \[6, 10\]"),
        (gain_by_difficulty, torch.ones(6, 10), r"before must have the shape of nll, \[6, 9\], got \[6, 10\]"),
        (gain_by_token, torch.ones(6, 9), r"windows\[:, 1:\] must have the shape of nll, \[6, 9\], got \[6, 8\]"),
        (gain_by_position, 0, "width must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(nll, function, argument, message):
    with pytest.raises(ValueError, match=message):
        function(nll, argument)


def test_means_of_other_tokens_than_there_are():
    with pytest.raises(ValueError, match=r"chosen must have the shape of values, \[2, 3\], got \[2\]"):
        token_mean(torch.ones(2, 3), torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize("parts", [0, 55, 2.5])
def test_there_are_as_many_tokens_as_parts_at_least(nll, parts):
    with pytest.raises((TypeError, ValueError), match=rf"parts must be an integer in \[1, 54\], got {parts}"):
        gain_by_difficulty(nll, nll.base, parts)
