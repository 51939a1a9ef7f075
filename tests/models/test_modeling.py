"""The model: thinking, the loss and its invariances, bad input. Numbers against the authors' are in test_parity.py."""

import re

import pytest
import torch
from scipy.stats import chisquare
from transformers import DynamicCache

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.models.transformers_names import CACHE


def assert_close(actual, expected):
    """Equal but for float32 rounding through the layers, about 1e-5 here; a wrong key or weight changes about 1e-1."""
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)


def gradients(model, output):
    """Loss gradient of every parameter, by name."""
    model.zero_grad()
    output.loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_cached_thinking_equals_the_tree(make_model, text):
    """Thoughts sampled step by step on the cache predict what the one-pass tree predicts for them."""
    for window in (None, 5):
        model = make_model(sliding_window=window, num_thoughts=1)
        with torch.no_grad():
            predicted = model(text)
            scored = model(text, labels=text, thought_tokens=predicted.thought_tokens)
        log_p = predicted.logits[:, :-1].log_softmax(-1).gather(-1, text[:, 1:, None])[..., 0]
        assert_close(-log_p, scored.talk_nll[:, 0, :, 0])
        assert_close(predicted.mixing_weight[:, :, :-1, 0], scored.mixing_weight[..., 0])


@pytest.mark.parametrize("window", [None, 2, 5])
def test_the_tree_is_the_base_model_on_every_thought_alone(make_model, text, window):
    """Also in a sliding window, which moves on with the steps of a thought as with any other tokens."""
    model = make_model(sliding_window=window, num_thoughts=1)
    thoughts = torch.randint(0, 10, (*text.shape, 3))[:, None]
    with torch.no_grad():
        scored = model(text, labels=text, thought_tokens=thoughts)
        embed, start, end = model.get_input_embeddings(), model.start_embedding(), model.end_embedding()
        for a in range(text.shape[1] - 1):
            own = [start.expand(len(text), 1, -1), embed(thoughts[:, 0, a]), end.expand(len(text), 1, -1)]
            hidden = model.model(inputs_embeds=torch.cat([embed(text[:, : a + 1]), *own], dim=1)).last_hidden_state
            base, thought = hidden[:, a], hidden[:, -1]
            logits = model.lm_head(torch.lerp(base, thought, model.mixing_head(base, thought)[:, None]))
            nll = torch.nn.functional.cross_entropy(logits, text[:, a + 1], reduction="none")
            assert_close(scored.talk_nll[:, 0, a, 0], nll)


def test_thoughts_follow_the_models_distribution(make_model):
    """Chi-square of 2-token thoughts against the probabilities that the tree gives them at temperature 1."""
    model = make_model(vocab_size=7, start_thought_token_id=5, end_thought_token_id=6, thought_length=2,
                       num_thoughts=1, policy_temperature=1.0, initializer_range=0.2)  # fmt: skip
    text = torch.tensor([[1, 2, 3, 4]])
    draws = 20_000
    tokens = model.sample_thoughts(text, anchors=torch.full((draws,), 1))
    assert tokens.shape == (1, draws, 2)
    counts = torch.bincount((tokens[0, :, 0] * 7 + tokens[0, :, 1]), minlength=49).view(7, 7)
    assert not counts[5:].any()
    assert not counts[:, 5:].any()

    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    with torch.no_grad():
        thoughts = pairs[:, None, None].expand(-1, 1, 4, -1)
        expected = model(text.expand(25, -1), labels=text.expand(25, -1), thought_tokens=thoughts)
    probability = expected.thought_logprobs[:, 0, 1].sum(-1).exp()
    assert_close(probability.sum(), torch.tensor(1.0))
    assert chisquare(counts[:5, :5].flatten(), probability.double() / probability.double().sum() * draws).pvalue > 1e-4


def test_sampling_is_reproducible_and_independent(make_model, text):
    model = make_model(num_thoughts=3)
    draws = [model.sample_thoughts(text, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0].shape == (2, 3, 12, 3)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][:, 0], draws[0][:, 1])


def test_given_anchors(make_model, text):
    model = make_model(thought_temperature=0.0)
    everywhere = model.sample_thoughts(text)[:, 0]
    anchors = torch.tensor([[7, -1, 0], [3, 3, -1]])
    thoughts = model.sample_thoughts(text, anchors=anchors)
    assert torch.equal(thoughts[0], torch.stack([everywhere[0, 7], torch.full((3,), -1), everywhere[0, 0]]))
    assert torch.equal(thoughts[1, :2], everywhere[1, [3, 3]])


def test_thought_logprobs_may_be_left_out(make_model, text):
    model = make_model()
    thoughts = model.sample_thoughts(text)
    whole = model(text, labels=text, thought_tokens=thoughts)
    lean = model(text, labels=text, thought_tokens=thoughts, output_thought_logprobs=False)
    assert lean.thought_logprobs is None
    assert torch.equal(lean.reward, whole.reward)
    assert_close(lean.loss, whole.loss)
    expected = gradients(model, whole)
    for name, gradient in gradients(model, lean).items():
        assert_close(gradient, expected[name])


def test_right_padding_contributes_nothing(make_model, text):
    model = make_model()
    thoughts = model.sample_thoughts(text)
    mask = torch.ones_like(text)
    mask[1, 8:] = 0
    padded = text * mask
    output = model(padded, attention_mask=mask, labels=padded, thought_tokens=thoughts * mask[:, None, :, None])
    short = model(text[1:, :8], labels=text[1:, :8], thought_tokens=thoughts[1:, :, :8])
    assert_close(output.base_nll[1, :7], short.base_nll[0])
    assert_close(output.talk_nll[1, :, :7], short.talk_nll[0])
    assert not output.base_nll[1, 7:].any()
    assert not output.talk_nll[1, :, 7:].any()

    garbage = padded.masked_fill(mask == 0, 5)
    other = model(garbage, attention_mask=mask, labels=garbage, thought_tokens=thoughts * mask[:, None, :, None])
    assert_close(gradients(model, other), gradients(model, output))


def test_left_padding_changes_nothing(make_model, text):
    model = make_model()
    thoughts = model.sample_thoughts(text)
    plain = model(text, labels=text, thought_tokens=thoughts)
    padded = torch.nn.functional.pad(text, (3, 0))
    output = model(
        padded,
        attention_mask=torch.nn.functional.pad(torch.ones_like(text), (3, 0)),
        labels=padded,
        thought_tokens=torch.nn.functional.pad(thoughts, (0, 0, 3, 0)),
    )
    assert_close(output.base_nll[:, 3:], plain.base_nll)
    assert_close(output.talk_nll[:, :, 3:], plain.talk_nll)
    assert output.loss.isfinite()


def test_thoughts_share_one_base_pass(make_model, text):
    """N thoughts at once give what N single thoughts give, at the cost of one base pass."""
    model = make_model(num_thoughts=3)
    thoughts = model.sample_thoughts(text)
    together = model(text, labels=text, thought_tokens=thoughts)
    model.config.num_thoughts = 1
    for n in range(3):
        alone = model(text, labels=text, thought_tokens=thoughts[:, n : n + 1])
        assert_close(together.talk_nll[:, n], alone.talk_nll[:, 0])
    assert together.base_nll.shape == (2, 11)


def test_gradient_checkpointing_changes_nothing(make_model, text):
    model = make_model().train()
    thoughts = model.sample_thoughts(text)
    wanted = gradients(model, model(text, labels=text, thought_tokens=thoughts))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_close(gradients(model, model(text, labels=text, thought_tokens=thoughts)), wanted)
    assert model(text, labels=text).loss.isfinite()  # sampling under checkpointing


def test_bfloat16(make_model, text):
    model = make_model(initializer_range=0.1)
    thoughts = model.sample_thoughts(text)
    exact = model(text, labels=text, thought_tokens=thoughts)
    output = model.to(torch.bfloat16)(text, labels=text, thought_tokens=thoughts)
    torch.testing.assert_close(output.base_nll, exact.base_nll, atol=0.05, rtol=0.02)
    torch.testing.assert_close(output.talk_nll, exact.talk_nll, atol=0.05, rtol=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients(model, output).values())
    assert model(text).logits.dtype == torch.bfloat16


def test_no_thought_tokens_means_no_policy_term(make_model, text):
    model = make_model(thought_length=0)
    output = model(text, labels=text)
    assert output.policy_loss == 0
    assert output.thought_tokens.shape == (2, 2, 12, 0)
    assert gradients(model, output)["start_embedding.weight"].any()
    assert model(text).logits.shape == (2, 12, 40)


def test_training_starts_at_the_base_model(make_model, text):
    model = make_model()
    torch.nn.init.zeros_(model.mixing_head[-1].weight)
    output = model(text, labels=text)
    assert not output.mixing_weight.any()
    assert_close(output.talk_nll[:, 0, :, 0], output.base_nll)


def test_no_gradient_of_the_reward(make_model, text):
    """With zero policy weight the loss is the mean of nll, whose gradient a finite difference confirms."""
    model = make_model(policy_weight=0.0).double()
    thoughts = model.sample_thoughts(text)
    parameter = model.mixing_head[0].bias
    grad = gradients(model, model(text, labels=text, thought_tokens=thoughts))["mixing_head.0.bias"]
    direction, step = torch.randn_like(parameter), 1e-6
    losses = []
    with torch.no_grad():
        for sign in (1, -2):
            parameter += sign * step * direction
            losses.append(model(text, labels=text, thought_tokens=thoughts).loss)
    assert_close((losses[0] - losses[1]) / (2 * step), (grad * direction).sum())


def test_kept_logits_are_the_last_of_all(make_model, text):
    model = make_model(thought_temperature=0.0)
    everything = model(text).logits
    assert_close(model(text, logits_to_keep=3).logits, everything[:, -3:])
    assert_close(model(text, logits_to_keep=torch.tensor([0, 7])).logits, everything[:, [0, 7]])


def test_model_runs_on_the_ops_default_backend(make_model, text, monkeypatch):
    model = make_model()
    monkeypatch.setenv("QUIETSTAR_BACKEND", "fast")
    with pytest.raises(ValueError, match="QUIETSTAR_BACKEND"):
        model(text)


TEXT = torch.ones(2, 12, dtype=torch.int64)
BAD_INPUT = {
    "rank": ({"input_ids": TEXT[0]}, ValueError, "input_ids must have shape [B, L], got 1 dimensions: [12]"),
    "not tokens": ({"input_ids": TEXT.float()}, TypeError, "input_ids must be int32 or int64, got torch.float32"),
    "token outside the vocabulary": ({"input_ids": TEXT * 40}, ValueError, "input_ids must be in [0, 39]"),
    "too short": (
        {"input_ids": TEXT[:, :3], "labels": TEXT[:, :3]},
        ValueError,
        "input_ids must have at least lookahead + 2 = 4 tokens per sequence, got 3",
    ),
    "labels shape": ({"labels": TEXT[:, 1:]}, ValueError, "labels must have the shape of input_ids, [2, 12], got"),
    "labels value": ({"labels": TEXT * -1}, ValueError, "labels must be in [0, 39]"),
    "mask shape": ({"attention_mask": TEXT[:1]}, ValueError, "attention_mask must have shape [2, 12], got [1, 12]"),
    "mask with a hole": (
        {"attention_mask": torch.tensor([[1, 0, 1] * 4] * 2)},
        ValueError,
        "attention_mask must be one run of ones",
    ),
    "thoughts shape": (
        {"thought_tokens": TEXT, "labels": TEXT},
        ValueError,
        "thought_tokens must have shape [2, 2, 12, 3], got [2, 12]",
    ),
    "thoughts value": (
        {"thought_tokens": torch.full((2, 2, 12, 3), 40), "labels": TEXT},
        ValueError,
        "thought_tokens must be in [0, 39]",
    ),
    "cache with labels": (
        {"labels": TEXT, CACHE: DynamicCache()},
        ValueError,
        f"{CACHE} must be None with labels",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named(name, make_model):
    arguments, error, message = BAD_INPUT[name]
    with pytest.raises(error, match=re.escape(message)):
        make_model()(**{"input_ids": TEXT} | arguments)


BAD_CONFIGURATION = {
    "thought_length": -1,
    "lookahead": 0,
    "num_thoughts": 0,
    "thought_temperature": -1.0,
    "policy_temperature": 0.0,
    "embedding_scale": 0.0,
    "base_loss_weight": 1.5,
    "attention_dropout": 0.1,
}


@pytest.mark.parametrize("name", BAD_CONFIGURATION)
def test_bad_configuration_is_named(name):
    with pytest.raises(ValueError, match=name):
        QuietStarConfig(**{name: BAD_CONFIGURATION[name]})


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({}, "start_thought_token_id must be a token id in [0, 40), got None"),
        (
            {"start_thought_token_id": 3, "end_thought_token_id": 40},
            "end_thought_token_id must be a token id in [0, 40)",
        ),
        ({"start_thought_token_id": 3, "end_thought_token_id": 3}, "end_thought_token_id must differ"),
    ],
)
def test_missing_thought_tokens_are_named(ids, message, make_model):
    model = make_model(start_thought_token_id=None, end_thought_token_id=None)
    for name, value in ids.items():
        setattr(model.config, name, value)
    for labels in (None, TEXT):
        with pytest.raises(ValueError, match=re.escape(message)):
            model(TEXT, labels=labels)


def test_only_our_attention_is_accepted(make_model):
    config = make_model().config
    config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="attn_implementation must be None or 'quietstar', got 'sdpa'"):
        QuietStarForCausalLM(config)
    with pytest.raises(ValueError, match="attn_implementation must be None or 'quietstar', got 'eager'"):
        make_model().set_attn_implementation("eager")
