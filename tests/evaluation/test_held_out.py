"""Measuring every prediction of held-out text, against each token predicted on its own."""

import math

import pytest
import torch
from transformers import MistralForCausalLM

from quietstar.evaluation import held_out_nll, text_nll

COLUMNS = ("base", "mixed", "thought", "mixing_weight")


@pytest.fixture
def windows():
    return torch.randint(1, 38, (3, 7))


@torch.no_grad()
def one_by_one(model, windows, thoughts):
    """What ``held_out_nll`` gives, as the definition says: one thought behind one prefix after the other."""
    model.eval()
    (count, length), num_thoughts = windows.shape, thoughts.shape[1]
    result = {name: torch.zeros(count, length - 1) for name in COLUMNS}
    start, end = model.start_embedding()[None], model.end_embedding()[None]
    for row, i in ((row, i) for row in range(count) for i in range(length - 1)):
        text, token = model.model.embed_tokens(windows[row, : i + 1]), windows[row, i + 1]

        def nll(hidden, token=token):
            return -model.lm_head(hidden).log_softmax(-1)[token]

        before = model.model(inputs_embeds=text[None]).last_hidden_state[0, -1]
        result["base"][row, i] = nll(before)
        for thought in thoughts[row, :, i]:
            sequence = torch.cat([text, start, model.model.embed_tokens(thought[thought >= 0]), end])
            after = model.model(inputs_embeds=sequence[None]).last_hidden_state[0, -1]
            weight = model.mixing_head(before, after)
            result["mixed"][row, i] += nll((1 - weight) * before + weight * after) / num_thoughts
            result["thought"][row, i] += nll(after) / num_thoughts
            result["mixing_weight"][row, i] += weight / num_thoughts
    return result


@pytest.mark.parametrize("thoughts", ["own", "shuffled", "random"])
def test_thoughts_that_end_themselves(model, windows, thoughts):
    """Each predicts at its own end, and random ones are as long as the model's own."""
    model.config.learned_thought_end = True
    model.lm_head.weight.data[model.config.end_thought_token_id] *= 3
    result = held_out_nll(model, windows, thoughts=thoughts, batch_size=2)
    lengths = (result.thought_tokens >= 0).sum(-1)
    assert len(lengths.unique()) > 1
    if thoughts == "random":
        own = held_out_nll(model, windows, batch_size=2).thought_tokens
        assert torch.equal(lengths, (own >= 0).sum(-1))
    for name, expected in one_by_one(model, windows, result.thought_tokens).items():
        torch.testing.assert_close(getattr(result, name), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("thoughts", ["own", "shuffled", "random", torch.randint(1, 38, (3, 3, 7, 4)), None], ids=type)
def test_equals_one_prediction_after_the_other(model, windows, thoughts):
    result = held_out_nll(model, windows, thoughts=thoughts, batch_size=2)
    if thoughts is None:
        assert result.thought_tokens.shape == (3, 2, 7, 0)
        assert result.mixed is result.thought is result.base
        assert not result.mixing_weight.any()
        expected = one_by_one(model, windows, result.thought_tokens)
        torch.testing.assert_close(result.base, expected["base"], atol=1e-5, rtol=1e-5)
        return
    assert result.thought_tokens.shape == ((3, 2, 7, 2) if isinstance(thoughts, str) else thoughts.shape)
    for name, values in one_by_one(model, windows, result.thought_tokens).items():
        torch.testing.assert_close(getattr(result, name), values, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["own", "shuffled", "random", None])
def test_the_seed_decides_and_the_model_is_left_as_it_was(model, windows, kind):
    state, config, seen = torch.get_rng_state(), model.config.to_dict(), []

    def progress(batches):
        seen.append(len(batches))
        return batches

    first, again, other = (held_out_nll(model, windows, thoughts=kind, seed=seed, batch_size=2, progress=progress)
                           for seed in (3, 3, 4))  # fmt: skip
    assert seen == [2, 2, 2]
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert model.config.to_dict() == config
    assert not model.mixing_head._forward_pre_hooks
    assert all(map(torch.equal, first, again))
    assert torch.equal(first.base, other.base)
    assert torch.equal(first.mixed, other.mixed) == (kind is None)


def test_own_thoughts_are_sampled_by_the_model_and_shuffled_ones_are_the_same_elsewhere(model, windows):
    own, shuffled = (held_out_nll(model, windows, thoughts=kind, seed=3).thought_tokens for kind in ("own", "shuffled"))
    torch.manual_seed(3)
    assert torch.equal(own, model.sample_thoughts(windows))

    def sorted_pairs(thoughts):
        return sorted(map(tuple, thoughts.transpose(1, 2).flatten(0, 1).flatten(1).tolist()))

    assert not torch.equal(own, shuffled)
    assert sorted_pairs(own) == sorted_pairs(shuffled)


@pytest.mark.parametrize("length", [0, 1, 5])
def test_thought_length_at_evaluation(model, windows, length):
    result = held_out_nll(model, windows, thought_length=length)
    assert result.thought_tokens.shape == (3, 2, 7, length)
    expected = one_by_one(model, windows, result.thought_tokens)["mixed"]
    torch.testing.assert_close(result.mixed, expected, atol=1e-5, rtol=1e-5)
    assert model.config.thought_length == 2


def test_an_error_leaves_the_model_as_it_was(model):
    config = model.config.to_dict()
    with pytest.raises(ValueError, match="input_ids"):
        held_out_nll(model, torch.full((1, 7), 99), thought_length=3)
    assert model.training
    assert model.config.to_dict() == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thoughts": "shuffle"}, "thoughts must be 'own', 'shuffled', 'random', a tensor or None, got 'shuffle'"),
        ({"thoughts": torch.zeros(3, 7, 2).long()}, r"thoughts must have shape \[3, N, 7, k\], .* got \[3, 7, 2\]"),
        ({"thoughts": torch.zeros(2, 1, 7, 2).long()}, r"thoughts must have shape .* got \[2, 1, 7, 2\]"),
        ({"thoughts": torch.zeros(3, 0, 7, 2).long()}, r"thoughts must have shape .* got \[3, 0, 7, 2\]"),
        ({"thoughts": None, "thought_length": 1}, "thought_length must be left out with given thoughts or none, got 1"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be an integer >= 1, got 1.5"),
        ({"batch_size": math.nan}, "batch_size must be an integer >= 1, got nan"),
        ({"seed": -1}, r"seed must be an integer in \[0, 4294967295\], got -1"),
        ({"windows": torch.ones(0, 9, dtype=torch.int64)}, r"windows must have shape .*, got \[0, 9\]"),
        ({"windows": torch.ones(9, dtype=torch.int64)}, r"windows must have shape .*, got \[9\]"),
        ({"thought_length": True}, "thought_length must be an integer >= 0, got True"),
        ({"thought_length": -1}, "thought_length must be an integer >= 0, got -1"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(model, windows, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        held_out_nll(model, **{"windows": windows} | options)


def test_a_model_that_does_not_think(model, windows):
    model.train()
    nll = text_nll(model, windows, batch_size=2)
    assert model.training
    torch.testing.assert_close(nll, held_out_nll(model, windows, thoughts=None).base)
    mistral = MistralForCausalLM(model.config)
    with torch.no_grad():
        logits = mistral.eval()(windows).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    torch.testing.assert_close(text_nll(mistral, windows), expected)
    with pytest.raises(ValueError, match=r"windows must have shape \[windows, L\]"):
        text_nll(mistral, windows[0])
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        text_nll(mistral, windows, batch_size=0)
