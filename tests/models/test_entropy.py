"""How sure of its thoughts a model is, against the distributions themselves."""

import pytest
import torch

from quietstar.models import entropy
from quietstar.models.head import Head


@torch.no_grad()
def literal(model, text, thoughts, counted):
    """Entropies [thoughts, k] of what the tokens of counted thoughts are drawn from, one text after the other."""
    start, rows = model.start_embedding()[None], []
    for b, n, i in ((b, n, i) for b, i in counted for n in range(thoughts.shape[1])):
        inside = model.model.embed_tokens(thoughts[b, n, i])[:-1]
        sequence = torch.cat([model.model.embed_tokens(text[b, : i + 1]), start, inside])
        hidden = model.model(inputs_embeds=sequence[None]).last_hidden_state[0, i + 1 :]
        logits = model.lm_head(hidden)[:, :38] / model.config.thought_temperature  # without the thought tokens
        rows.append(torch.distributions.Categorical(logits=logits).entropy())
    return torch.stack(rows)


def measured(model, text, **arguments):
    return model(text, labels=text, output_thought_entropy=True, **arguments)


@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.0])
def test_is_that_of_the_distributions_thoughts_are_drawn_from(make_model, text, monkeypatch, temperature):
    """At their temperature, whatever that of the policy term."""
    monkeypatch.setattr(entropy, "TOKENS", 1000)
    model = make_model(thought_temperature=temperature, policy_temperature=3.0)
    output = measured(model, text)
    expected = literal(model, text, output.thought_tokens, [(b, i) for b in range(2) for i in range(11)])
    torch.testing.assert_close(output.thought_entropy, expected.mean(), atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.05


def test_only_thoughts_with_something_to_predict_count(make_model, text):
    """Not behind padding, nor where no label is within reach, which is two tokens."""
    model = make_model()
    mask, labels = torch.ones_like(text), text.clone()
    mask[0, 7:], labels[1, 5:] = 0, -100
    output = model(text, attention_mask=mask, labels=labels, output_thought_entropy=True)
    counted = [(0, i) for i in range(6)] + [(1, i) for i in range(4)]
    expected = literal(model, text, output.thought_tokens, counted)
    torch.testing.assert_close(output.thought_entropy, expected.mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 9, 40])
def test_of_many_thoughts_some_are_looked_at_evenly_spread(monkeypatch, make_model, tokens):
    """Every distribution has an entropy of its own here: that of its row of the head, log of a number of tokens."""
    monkeypatch.setattr(entropy, "TOKENS", tokens)
    config = make_model(thought_length=3).config
    counted = torch.rand(4, 11) < 0.6
    sizes = torch.randint(1, 30, (4, 11, 2, 3))
    hidden = torch.where(torch.arange(40) < sizes[..., None], 0.0, -1e9)  # logits, by a head that changes nothing
    seen = []
    monkeypatch.setattr(entropy, "_entropy", lambda rows, *_, f=entropy._entropy: seen.append(f(rows, *_)) or seen[-1])
    value = entropy.thought_entropy(hidden, Head(torch.eye(40)), counted, config)
    entropies = sizes.double().log()[counted].flatten(0, 1)  # of the thoughts that count, in order
    looked_at = min(max(1, tokens // 3), 88)
    chosen = sorted({j * len(entropies) // looked_at for j in range(looked_at)})
    torch.testing.assert_close(value.double(), entropies[chosen].mean(), atol=1e-5, rtol=1e-5)
    assert sum(map(len, seen)) == looked_at * 3


def test_what_has_no_entropy(make_model, text):
    assert measured(make_model(thought_temperature=0.0), text).thought_entropy == 0
    assert measured(make_model(thought_length=0), text).thought_entropy.isnan()
    unlabelled = torch.full_like(text, -100)
    assert make_model()(text, labels=unlabelled, output_thought_entropy=True).thought_entropy.isnan()
    assert make_model()(text, labels=text).thought_entropy is None


def test_it_changes_nothing_else(make_model, text):
    model = make_model()
    gradients = []
    for wanted in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        model(text, labels=text, output_thought_entropy=wanted).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
