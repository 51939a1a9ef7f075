"""The gain head: trained on measured gains and nothing else, and asked where to think."""

import pytest
import torch
from transformers import GenerationConfig

from quietstar import QuietStarConfig, QuietStarForCausalLM

GAIN_WEIGHT, THRESHOLD = 0.3, 0.1
OPTIONS = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "return_thoughts": True}


@pytest.fixture
def make_learner(make_model):
    """A factory of models whose gain head expects something else behind every token."""

    def make(**fields):
        model = make_model(**{"gain_weight": GAIN_WEIGHT} | fields)
        torch.nn.init.normal_(model.gain_head[-1].weight, std=0.3)
        return model

    return make


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def literal_loss(model, text, output, measured):
    """Mean squared error, one thinking position after the other: row, column of its thoughts, place in the text."""
    hidden = model.model(text).last_hidden_state.detach()
    first, _, last = model.gain_head
    errors = []
    for b, column, i in measured:
        expected = last.weight[0] @ (first.weight @ hidden[b, i] + first.bias).relu() + last.bias[0]
        gain = output.base_nll[b, i] - output.talk_nll[b, :, column, 0].mean()
        errors.append((expected - gain.detach()).square())
    return torch.stack(errors).mean()


EVERYWHERE = [(b, i, i) for b in range(2) for i in range(11)]
ANCHORS = torch.tensor([[2, 7, -1], [11, 0, 4]])  # behind the last token nothing can be measured
CASES = {
    "everywhere": ({}, {}, EVERYWHERE),
    "one label left out": ({}, {"labels": 5}, [row for row in EVERYWHERE if row[2] != 4]),
    "anchors": ({}, {"anchors": ANCHORS}, [(0, 0, 2), (0, 1, 7), (1, 1, 0), (1, 2, 4)]),
    "the thought's prediction alone": ({"prediction": "thought"}, {}, EVERYWHERE),
}


@pytest.mark.parametrize(("fields", "arguments", "measured"), CASES.values(), ids=CASES)
def test_loss_and_gradient_are_those_of_a_literal_version(make_learner, text, fields, arguments, measured):
    model, labels = make_learner(**fields).double(), text.clone()
    if column := arguments.get("labels"):
        labels[:, column] = -100
    output = model(text, **arguments | {"labels": labels})
    found = gradients(model, output.loss)
    literal = literal_loss(model, text, output, measured)
    torch.testing.assert_close(output.gain_loss, literal.detach(), rtol=1e-6, atol=0)
    for name, gradient in gradients(model, GAIN_WEIGHT * literal).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)
        assert name.startswith("gain_head.") == bool(gradient.any())


def test_nothing_else_changes(make_learner, text):
    """Neither losses nor gradients: those of the same weights without the head."""
    model = make_learner()
    plain = QuietStarForCausalLM(type(model.config).from_dict(model.config.to_dict() | {"gain_weight": 0.0}))
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("gain_head.")})
    thoughts = model.sample_thoughts(text)
    outputs = [each(text, labels=text, thought_tokens=thoughts) for each in (model, plain)]
    torch.testing.assert_close(outputs[0].loss - GAIN_WEIGHT * outputs[0].gain_loss, outputs[1].loss)
    with_head, without = (gradients(each, output.loss) for each, output in zip((model, plain), outputs, strict=True))
    assert {name for name in with_head if name not in without} == {
        f"gain_head.{name}" for name, _ in model.gain_head.named_parameters()
    }
    assert all(torch.equal(with_head[name], gradient) for name, gradient in without.items())
    assert plain.gain_head is None
    assert outputs[1].gain_loss is outputs[1].expected_gain is None


def test_where_no_thought_is_measured_the_loss_is_zero(make_learner, text):
    output = make_learner()(text, labels=torch.full_like(text, -100))
    assert output.gain_loss == 0


def test_before_training_nothing_is_expected_and_nowhere_thought(make_model, text):
    model = make_model(gain_weight=GAIN_WEIGHT)
    assert not model(text, labels=text).expected_gain.any()
    for options in ({}, {"gain_threshold": 0}):
        assert model.generate(text, think="learned", **OPTIONS, **options).thought_share == 0
    assert model.generate(text, think="learned", gain_threshold=-1e-3, **OPTIONS).thought_share == 1


@torch.no_grad()
def expected_in_front(model, output, mask=None):
    """What the head expects, in one pass over the finished text, in front of every new token."""
    texts = output.sequences
    mask = (
        torch.ones_like(texts)
        if mask is None
        else torch.nn.functional.pad(mask, (0, OPTIONS["max_new_tokens"]), value=1)
    )
    starts = mask.argmax(dim=1)
    hidden = [model.model(row[None, start:]).last_hidden_state[0] for row, start in zip(texts, starts, strict=True)]
    new = output.thinks.shape[1]
    return torch.stack([model.gain_head(states[-new - 1 : -1]) for states in hidden])


@pytest.mark.parametrize("padded", [False, True], ids=["", "left padding"])
@pytest.mark.parametrize("draft_length", [None, 3, "auto"])
def test_thinks_exactly_where_more_is_expected(make_learner, text, draft_length, padded):
    """Also behind drafts; with them greedy text is that without, thoughts being greedy too."""
    model = make_learner(thought_temperature=0.0)
    model.mixing_head[-1].weight.data *= 0.02  # some drafts are accepted
    mask = torch.ones_like(text)
    mask[1, : 4 * padded] = 0
    arguments = OPTIONS | {"think": "learned", "gain_threshold": THRESHOLD, "attention_mask": mask}
    output = model.generate(text, draft_length=draft_length, **arguments)
    expected = expected_in_front(model, output, mask)
    assert torch.equal(output.thinks, expected > THRESHOLD)
    assert 0.1 < output.thought_share < 0.9
    assert (expected - THRESHOLD).abs().min() > 1e-4  # else rounding decides
    assert torch.equal(output.thinks, (output.thought_tokens >= 0).all(dim=-1))
    if draft_length is not None:
        assert output.accepted > 0
        assert torch.equal(output.sequences, model.generate(text, **arguments).sequences)


@pytest.mark.parametrize("place", ["config", "generation_config"])
def test_a_model_may_say_so_and_is_saved_with_its_head(make_learner, text, tmp_path, place):
    model = make_learner()
    setting = getattr(model, place)
    setting.think, setting.gain_threshold = "learned", THRESHOLD
    model.save_pretrained(tmp_path)
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path)
    output = loaded.generate(text, **OPTIONS)
    assert torch.equal(output.thinks, expected_in_front(model, output) > THRESHOLD)
    assert 0 < output.thought_share < 1
    assert loaded.generate(text, gain_threshold=1e3, **OPTIONS).thought_share == 0
    given = GenerationConfig(think="learned", gain_threshold=-1e3, max_new_tokens=4, pad_token_id=0)
    assert loaded.generate(text, given, return_thoughts=True).thought_share == 1
    assert loaded.generate(text, think="never", **OPTIONS).thought_share == 0


def test_a_saved_threshold_does_not_count_without_learned(make_learner, text):
    """Plain thinking stays in transformers' loops, which know more."""
    model = make_learner(gain_threshold=5.0)
    output = model.generate(text, max_new_tokens=2, num_beams=2, pad_token_id=0)
    assert output.shape == (2, 14)


def test_a_head_is_added_to_a_checkpoint_that_has_none(make_model, make_learner, tmp_path):
    make_model().save_pretrained(tmp_path / "without")
    grown = QuietStarForCausalLM.from_pretrained(tmp_path / "without", gain_weight=1.0)
    assert not grown.gain_head[-1].weight.any()
    assert not grown.gain_head[-1].bias.any()
    assert grown.gain_head[0].weight.std() > 0.1
    model = make_learner()
    model.save_pretrained(tmp_path / "with")
    for fields in ({}, {"gain_weight": 2.0}):
        again = QuietStarForCausalLM.from_pretrained(tmp_path / "with", **fields)
        assert torch.equal(again.gain_head[-1].weight, model.gain_head[-1].weight)
    config = QuietStarConfig.from_pretrained(tmp_path / "without")
    config.gain_weight = 1.0
    with pytest.raises(ValueError, match=r"lacks gain_head\.0\.bias"):
        QuietStarForCausalLM.from_pretrained(tmp_path / "without", config=config)


REFUSED = {
    "no head": ({}, {"think": "learned"}, "gain_weight must be > 0 .*think='learned'.*got a model without one"),
    "another way": (
        {"gain_weight": 1.0},
        {"think": 2.0, "gain_threshold": 0.1},
        "think must be 'learned' with gain_thr",
    ),
    "not a number": (
        {"gain_weight": 1.0},
        {"think": "learned", "gain_threshold": "0.1"},
        "gain_threshold must be a fin",
    ),
    "not finite": (
        {"gain_weight": 1.0},
        {"think": "learned", "gain_threshold": float("nan")},
        "gain_threshold must be",
    ),
}


@pytest.mark.parametrize(("fields", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused(make_model, text, fields, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_model(**fields).generate(text, max_new_tokens=2, pad_token_id=0, **options)


def test_a_configuration_without_a_head_is_not_learned(make_model, text):
    with pytest.raises(ValueError, match=r"gain_weight must be > 0 with think 'learned', got 0.0"):
        QuietStarConfig(think="learned")
    with pytest.raises(ValueError, match=r"gain_weight must be >= 0, got -1"):
        QuietStarConfig(gain_weight=-1)
    model = make_model()
    model.config.gain_weight = 1.0  # too late
    with pytest.raises(ValueError, match=r"gain_weight must be > 0 when a model is made.*got a model without one"):
        model(text, labels=text)
