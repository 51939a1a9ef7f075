"""Measuring both predictions on held-out text."""

import math

import pytest
import torch

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.evaluation import hardest, held_out_nll, token_mean


@pytest.fixture
def model():
    config = QuietStarConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=None, initializer_range=0.3, thought_length=2, lookahead=3,
        num_thoughts=2, start_thought_token_id=38, end_thought_token_id=39,
    )  # fmt: skip
    model = QuietStarForCausalLM(config)
    torch.nn.init.normal_(model.mixing_head[-1].weight)
    return model


def test_both_predictions_are_the_models_own(model):
    windows = torch.randint(1, 38, (5, 9))
    state, seen = torch.get_rng_state(), []
    nll = held_out_nll(
        model, windows, batch_size=2, seed=3, progress=lambda batches: seen.append(len(batches)) or batches
    )
    assert seen == [3]
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert torch.equal(nll.mixed, held_out_nll(model, windows, batch_size=2, seed=3).mixed)
    assert not torch.equal(nll.mixed, held_out_nll(model, windows, batch_size=2, seed=4).mixed)

    # Thoughts given, each prediction is a softmax over logits: the lm_head's of the base, the mixed ones of forward.
    torch.manual_seed(3)
    first = windows[:2]
    thoughts = model.sample_thoughts(first)
    base = model.lm_head(model.model(first).last_hidden_state).log_softmax(-1)
    mixed = [model.eval()(first, thought_tokens=thoughts[:, n : n + 1]).logits.log_softmax(-1) for n in range(2)]
    following = first[:, 1:, None]
    torch.testing.assert_close(nll.base[:2], -base[:, :-1].gather(2, following)[..., 0])
    expected = -torch.stack([logits[:, :-1].gather(2, following)[..., 0] for logits in mixed]).mean(0)
    torch.testing.assert_close(nll.mixed[:2], expected)


def test_hardest_tokens():
    nll = torch.arange(40.0).reshape(4, 10)[:, torch.randperm(10)]
    assert torch.equal(hardest(nll), nll >= 36)
    assert torch.equal(hardest(nll, 1.0), torch.ones(4, 10, dtype=torch.bool))
    assert hardest(nll, 1e-6).sum() == 1
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        hardest(nll, 0)


@pytest.mark.parametrize("share", [-0.1, 1.01, math.nan, math.inf, True, "0.1", None])
def test_shares_that_are_none(share):
    with pytest.raises((TypeError, ValueError), match=r"share must be (a number )?(in \(0, 1\]|finite), got"):
        hardest(torch.ones(2, 2), share)
    with pytest.raises(ValueError, match=r"nll must hold at least one token, got shape \[0, 3\]"):
        hardest(torch.ones(0, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be an integer >= 1, got 1.5"),
        ({"batch_size": math.nan}, "batch_size must be an integer >= 1, got nan"),
        ({"seed": -1}, r"seed must be an integer in \[0, 4294967295\], got -1"),
        ({"windows": torch.ones(0, 9, dtype=torch.int64)}, r"windows must have shape .*, got \[0, 9\]"),
        ({"windows": torch.ones(9, dtype=torch.int64)}, r"windows must have shape .*, got \[9\]"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(model, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        held_out_nll(model, **{"windows": torch.ones(2, 9, dtype=torch.int64)} | options)


def test_means_of_other_tokens_than_there_are():
    with pytest.raises(ValueError, match=r"chosen must have the shape of values, \[2, 3\], got \[2\]"):
        token_mean(torch.ones(2, 3), torch.ones(2, dtype=torch.bool))


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
    mean, error = token_mean(torch.ones(1, 4))
    assert mean == 1.0
    assert math.isnan(error)
