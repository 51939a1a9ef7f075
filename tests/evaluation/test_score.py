"""Scoring a text: both predictions of every token, as plain forward passes give them."""

import pytest
import torch
import word_model
from transformers import AutoTokenizer

from quietstar import QuietStarForCausalLM
from quietstar.evaluation import score


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return word_model.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def model(folder):
    return QuietStarForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("text", ["the cat", "the cat sat", "the cat sat on a mat on the mat"])
def test_equals_the_forward_pass(model, tokenizer, text):
    model.train()
    result = score(model, tokenizer, text)
    assert model.training
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    count = ids.shape[1] - 1
    assert result.tokens.tolist() == ids[0, 1:].tolist()
    assert result.thought_tokens.shape == (2, count, 3)

    def of_tokens(logits):
        return logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]

    with torch.no_grad():
        base = of_tokens(model.lm_head(model.model(ids).last_hidden_state))
        torch.testing.assert_close(result.base_logprobs, base, atol=1e-5, rtol=1e-5)
        for n in range(2):
            whole = torch.nn.functional.pad(result.thought_tokens[None, None, n], (0, 0, 0, 1))
            output = model(ids, thought_tokens=whole)
            torch.testing.assert_close(result.logprobs[n], of_tokens(output.logits), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                result.mixing_weight[n], output.mixing_weight[0, 0, :-1, 0], atol=1e-5, rtol=1e-5
            )


def test_the_seed_decides_and_nothing_else_is_touched(model, tokenizer):
    first, state = score(model, tokenizer, "the cat sat on a mat"), torch.random.get_rng_state()
    again, other = (score(model, tokenizer, "the cat sat on a mat", seed=seed) for seed in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.thought_tokens, other.thought_tokens)


@pytest.mark.parametrize(("text", "count"), [("", 0), ("cat", 1), ("cat " * 33, 33)])
def test_texts_of_wrong_length_are_refused(model, tokenizer, text, count):
    with pytest.raises(ValueError, match=f"text must have 2 to max_position_embeddings = 32 tokens, got {count}"):
        score(model, tokenizer, text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": 3}, "text must be a str, got int"),
        ({"text": "the cat", "seed": 2**32}, r"seed must be an integer in \[0, 4294967295\], got 4294967296"),
        ({"text": "the cat", "seed": True}, r"seed must be an integer in .*, got True"),
    ],
)
def test_bad_arguments_are_named(model, tokenizer, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        score(model, tokenizer, **arguments)
