"""What callers of a causal language model in transformers pass to it and expect back."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from quietstar.models.transformers_names import CACHE, CACHE_NAMES


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


@pytest.fixture
def thoughts():
    return torch.randint(1, 38, (2, 1, 12, 3))


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_is_taken_under_both_names(make_model, text, name):
    model = make_model(thought_temperature=0.0)
    with torch.no_grad():
        whole = model(text).logits[:, 8:]
        cache = model(text[:, :8], **{name: DynamicCache(config=model.config)})[CACHE]
        assert cache.get_seq_length() == 8
        assert_close(model(text[:, 8:], **{name: cache}).logits, whole)
    for length in (1, 4):
        with pytest.raises(ValueError, match="cache must be None beside past_key_values"):
            model(text[:, :length], **dict.fromkeys(CACHE_NAMES, cache))


@pytest.mark.parametrize("name", ["lables", "past_key_value", "cache_position", "draft_length", "num_items_in_batch"])
def test_unknown_arguments_are_refused(make_model, text, name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        make_model()(text, **{name: None})
    with pytest.raises(ValueError, match="lables"):
        make_model().generate(text, max_new_tokens=1, lables=text)


def test_a_tuple_where_it_is_asked_for(make_model, text, thoughts):
    model = make_model(num_thoughts=1)
    output = model(text, thought_tokens=thoughts, labels=text)
    values = model(text, thought_tokens=thoughts, labels=text, return_dict=False)
    assert isinstance(values, tuple)
    assert torch.equal(values[0], output.loss)
    model.config.return_dict = False
    assert isinstance(model(text, thought_tokens=thoughts), tuple)


@pytest.mark.parametrize("labelled", [False, True])
def test_hidden_states_are_those_of_the_base_model(make_model, text, thoughts, labelled):
    model = make_model(num_thoughts=1)
    fields = model.config.text_config.to_dict()
    base = MistralForCausalLM(MistralConfig(**fields | {"model_type": "mistral"})).eval()
    base.load_state_dict(model.state_dict(), strict=False)
    expected = base(text, output_hidden_states=True).hidden_states
    options = {"labels": text} if labelled else {}
    output = model(text, thought_tokens=thoughts, output_hidden_states=True, **options)
    actual = output.hidden_states
    assert len(actual) == len(expected) == 3
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)
    first, second, last = model(text, thought_tokens=thoughts, output_hidden_states=[0, -1], **options).hidden_states
    assert second is None
    assert torch.equal(first, actual[0])
    assert torch.equal(last, actual[2])
    for states in actual:
        states.retain_grad()
    (output.loss if labelled else output.logits.sum()).backward()
    assert all(states.grad.any() for states in actual)
    assert model(text).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(text).hidden_states) == 3


def test_attentions_are_refused(make_model, text):
    model = make_model()
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(text, output_attentions=True)


@pytest.mark.parametrize("labelled", [False, True])
def test_embeddings_in_place_of_tokens(make_model, text, thoughts, labelled):
    model = make_model(num_thoughts=1)
    options = {"thought_tokens": thoughts} | ({"labels": text} if labelled else {})
    expected = model(text, **options)
    actual = model(inputs_embeds=model.get_input_embeddings()(text), **options)
    name = "loss" if labelled else "logits"
    assert_close(getattr(actual, name), getattr(expected, name))


def test_generate_from_embeddings(make_model, text):
    model = make_model(thought_temperature=0.0)
    expected = model.generate(text, max_new_tokens=5)[:, text.shape[1] :]
    embeddings = model.get_input_embeddings()(text)
    assert torch.equal(model.generate(inputs_embeds=embeddings, max_new_tokens=5), expected)


def test_tokens_or_embeddings_not_both(make_model, text):
    model = make_model()
    with pytest.raises(ValueError, match="input_ids or inputs_embeds must be given, one of them, got neither"):
        model(labels=text)
    with pytest.raises(ValueError, match="got both"):
        model(text, inputs_embeds=torch.zeros(2, 12, 32))
    with pytest.raises(ValueError, match=r"position_ids must have shape \[2, 12\] or \[1, 12\], got \[2, 11\]"):
        model(text, position_ids=torch.zeros(2, 11, dtype=torch.int64))


@pytest.mark.parametrize("thought_length", [0, 3])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"logits_to_keep": 4}, {"logits_to_keep": 1}], ids=str)
def test_gradients_of_a_loss_of_ones_own(make_model, text, options, thought_length):
    """Through sampled thoughts, as through the same thoughts given."""
    model = make_model(thought_length=thought_length, thought_temperature=0.0).train()

    def gradients(**more):
        model.zero_grad()
        output = model(text, **options, **more)
        F.cross_entropy(output.logits.flatten(0, 1), text[:, -output.logits.shape[1] :].flatten()).backward()
        return output, [parameter.grad for parameter in model.parameters()]

    output, sampled = gradients()
    _, given = gradients(thought_tokens=output.thought_tokens)
    for (name, _), actual, expected in zip(model.named_parameters(), sampled, given, strict=True):
        assert actual is not None, name
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def test_gradients_equal_those_of_the_training_pass(make_model, text):
    """The mixed loss of one look-ahead step is the cross-entropy of the logits."""
    model = make_model(lookahead=1, num_thoughts=1, base_loss_weight=0.0, policy_weight=0.0)
    thoughts = torch.randint(1, 38, (2, 1, 12, 3))
    collected = []
    for labelled in (True, False):
        model.zero_grad()
        if labelled:
            loss = model(text, labels=text, thought_tokens=thoughts).loss
        else:
            logits = model(text, thought_tokens=thoughts).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        collected.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in collected[0].items():
        torch.testing.assert_close(collected[1][name], gradient, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("given", [False, True])
def test_gradient_checkpointing_changes_no_gradient_of_ones_own_loss(make_model, text, given):
    model = make_model(thought_temperature=0.0).train()
    options = {"thought_tokens": torch.randint(1, 38, (2, 1, 12, 3))} if given else {}
    collected = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        F.cross_entropy(model(text, **options).logits.flatten(0, 1), text.flatten()).backward()
        collected.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*collected, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=f"{CACHE} must be None with gradient checkpointing"):
        model(text, **{CACHE: DynamicCache()})


def test_steps_with_a_cache_may_be_trained_on(make_model, text):
    """A loop of calls that keep the cache, then one backward through all of them."""
    model = make_model(thought_temperature=0.0).train()
    cache, losses = None, []
    for column in range(3):
        output = model(text[:, column : column + 1], **{CACHE: cache}, use_cache=True)
        cache = output[CACHE]
        losses.append(F.cross_entropy(output.logits[:, -1], text[:, column + 1]))
    sum(losses).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
