"""The likeliest tokens, against all logits of one prediction after the other."""

import pytest
import torch

from quietstar.evaluation import held_out_nll, likeliest, likeliest_tokens


@pytest.fixture
def windows():
    return torch.randint(1, 38, (3, 7))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, likeliest.CHUNK])
def test_equals_the_largest_of_all_logits(model, windows, monkeypatch, chunk):
    monkeypatch.setattr(likeliest, "CHUNK", chunk)  # also one row at a time
    thoughts = torch.randint(1, 38, (3, 2, 7, 4))
    result = likeliest_tokens(model, windows, thoughts, count=5, batch_size=2)
    model.eval()
    model.config.thought_length = 4
    for row in range(len(windows)):
        base = model.lm_head(model.model(windows[row, None]).last_hidden_state[0, :-1]).log_softmax(-1).topk(5)
        torch.testing.assert_close(result.base_logprobs[row], base.values, atol=1e-5, rtol=1e-5)
        assert torch.equal(result.base_tokens[row], base.indices)
        for n in range(2):
            logits = model(windows[row, None], thought_tokens=thoughts[row, n, None, None]).logits[0, :-1]
            mixed = logits.log_softmax(-1).topk(5)
            torch.testing.assert_close(result.mixed_logprobs[row, n], mixed.values, atol=1e-5, rtol=1e-5)
            assert torch.equal(result.mixed_tokens[row, n], mixed.indices)


def test_a_token_that_is_among_them_has_the_log_p_of_its_nll(model, windows):
    nll = held_out_nll(model, windows, thoughts=torch.randint(1, 38, (3, 1, 7, 2)))
    result = likeliest_tokens(model, windows, nll.thought_tokens, count=40)
    place = (result.mixed_tokens[:, 0] == windows[:, 1:, None]).nonzero(as_tuple=True)
    torch.testing.assert_close(-result.mixed_logprobs[:, 0][place].view(3, 6), nll.mixed, atol=1e-5, rtol=1e-5)


def test_the_model_is_left_as_it_was(model, windows):
    model.train()
    before = model.config.to_dict()
    likeliest_tokens(model, windows, torch.ones(3, 1, 7, 3, dtype=torch.int64))
    assert model.config.to_dict() == before
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, r"count must be an integer in \[1, 40\], got 0"),
        ({"count": 41}, r"count must be an integer in \[1, 40\], got 41"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"windows": torch.ones(3, dtype=torch.int64)}, r"windows must have shape \[windows, L\]"),
        ({"thoughts": torch.ones(3, 1, 6, 2, dtype=torch.int64)}, r"thoughts must have shape \[3, N, 7, k\]"),
    ],
)
def test_bad_arguments_are_named(model, windows, arguments, message):
    thoughts = torch.ones(3, 1, 7, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        likeliest_tokens(model, **{"windows": windows, "thoughts": thoughts} | arguments)
