"""Every family that can think: its own forward is the measure, over each thought alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from decoder_families import FAMILIES, VOCABULARY, decoder_of
from greedy_text import SOME_ACCEPTED, greedy, left_padded, recompute
from safetensors import safe_open
from thoughts_alone import Alone
from transformers import AutoModelForCausalLM

from quietstar import QuietStarForCausalLM

THINKING = {
    "thought_length": 2, "lookahead": 2, "num_thoughts": 2, "embedding_scale": 1.0, "policy_temperature": 2.0,
    "policy_weight": 3.0, "thought_temperature": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def made(request, tmp_path_factory):
    """Of each family a folder with a model, the model, and what thinks on top of it, with weight."""
    torch.manual_seed(0)
    folder, base = tmp_path_factory.mktemp("base"), decoder_of(request.param)
    base.save_pretrained(folder)
    model = QuietStarForCausalLM.from_base(folder, initial_token_ids=[5, 9], **THINKING).eval()
    torch.nn.init.normal_(model.mixing_head[-1].weight, std=0.1)
    return folder, base, model


@pytest.fixture
def base(made):
    return made[:2]


@pytest.fixture
def model(made):
    return copy.deepcopy(made[2])


@pytest.fixture
def text():
    return torch.randint(1, VOCABULARY, (2, 12))


@pytest.fixture
def thoughts():
    return torch.randint(1, VOCABULARY, (2, 2, 12, 2))


@torch.no_grad()
def test_predictions_are_those_of_each_thought_alone(model, text, thoughts):
    alone, given = Alone(model), thoughts[:, :1]
    output = model(text, thought_tokens=given)
    hidden, own_logits = alone(alone.embed(text))
    expected = torch.stack(
        [alone.mixed(hidden[:, i], alone.thought(text, i, given[:, 0, i])[:, -1]) for i in range(12)], dim=1
    )  # fmt: skip
    assert 5 < expected.abs().max() < 20
    torch.testing.assert_close(output.logits, expected, atol=3e-5, rtol=0)
    plain = model.predictor().logits(model.model(text).last_hidden_state)
    torch.testing.assert_close(plain, own_logits, atol=3e-5, rtol=0)


def losses_alone(alone, text, thoughts):
    """The objective by its definition: loss, nll without a thought, with one, and log p of the thoughts."""
    config = alone.thinking.config
    k, M, (batch, length) = config.thought_length, config.lookahead, text.shape
    hidden, logits = alone(alone.embed(text))
    base = F.cross_entropy(logits[:, :-1].transpose(1, 2), text[:, 1:], reduction="none")
    talk = base.new_zeros(batch, config.num_thoughts, length - 1, M)
    log_p = base.new_zeros(batch, config.num_thoughts, length - 1, k)
    for n, i in torch.cartesian_prod(torch.arange(config.num_thoughts), torch.arange(length - 1)).tolist():
        slots = alone.thought(text, i, thoughts[:, n, i], M)
        for m in range(min(M, length - 1 - i)):
            mixed = alone.mixed(hidden[:, i + m], slots[:, k + 1 + m])
            talk[:, n, i, m] = F.cross_entropy(mixed, text[:, i + m + 1], reduction="none")
        policy = alone.logits(slots[:, :k]) / config.policy_temperature
        policy[..., list(config.thought_token_ids)] = -torch.inf
        log_p[:, n, i] = policy.log_softmax(-1).gather(-1, thoughts[:, n, i, :, None])[..., 0]
    talk_loss = sum(talk[:, :, : length - 1 - m, m].mean() for m in range(M)) / M
    ahead = torch.stack([base[:, m : length - 1 - M + m] for m in range(M)], dim=-1)
    reward = (ahead[:, None] - talk[:, :, : length - 1 - M]).sum(-1).detach()
    advantage = (reward - reward.mean(1, keepdim=True)).clamp_min(0)
    policy = -(advantage[..., None] * log_p[:, :, : length - 1 - M]).mean()
    return 0.5 * base.mean() + 0.5 * talk_loss + config.policy_weight * policy, base, talk, log_p


def test_losses_and_gradients_are_those_of_thoughts_alone(model, text, thoughts):
    model.double().set_experts_implementation("eager")  # the other one has no float64
    text, thoughts = text[:1, :7], thoughts[:1, :, :7]
    output = model(text, labels=text, thought_tokens=thoughts)
    loss, *parts = losses_alone(Alone(model), text, thoughts)
    for actual, expected in zip((output.base_nll, output.talk_nll, output.thought_logprobs), parts, strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(x, parameters, retain_graph=True) for x in (output.loss, loss))
    for name, actual, expected in zip(names, ours, theirs, strict=True):
        assert expected.any(), name
        assert (actual - expected).norm() < 1e-4 * expected.norm(), name


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_every_way_to_the_text_gives_the_same(model, text, padded):
    model.mixing_head[-1].weight.data *= 10 * SOME_ACCEPTED
    inputs, mask = left_padded(text) if padded else (text, torch.ones_like(text))
    with torch.no_grad():
        wanted = recompute(model, inputs, 6, mask if padded else None)
    for options in ({"cache_implementation": "static"} if padded else {}, {"draft_length": 3}):
        assert torch.equal(greedy(model, inputs, 6, attention_mask=mask, **options), wanted), options


@torch.no_grad()
def test_left_padding_changes_nothing(model, text, thoughts):
    padded, mask = F.pad(text, (3, 0)), F.pad(torch.ones_like(text), (3, 0))
    behind = model(padded, attention_mask=mask, labels=padded, thought_tokens=F.pad(thoughts, (0, 0, 3, 0)))
    output = model(text, labels=text, thought_tokens=thoughts)
    torch.testing.assert_close(behind.base_nll[:, 3:], output.base_nll, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(behind.talk_nll[:, :, 3:], output.talk_nll, atol=1e-4, rtol=1e-4)


def test_thoughts_begin_with_embeddings_of_the_base(base, model):
    expected = base[1].get_input_embeddings()(torch.tensor([5, 9])).mean(dim=0)  # some families scale them
    torch.testing.assert_close(model.start_embedding(), expected)
    torch.testing.assert_close(model.end_embedding(), expected)


def test_without_thoughts_it_is_the_base_model(base, model, text):
    assert torch.equal(greedy(model, text, think="never"), greedy(base[1], text))


def tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)


def test_a_saved_model_loads_bit_by_bit(base, model, text, thoughts, tmp_path):
    """The decoder's tensors under the names that they have in the base's folder."""
    model.save_pretrained(tmp_path / "saved")
    saved, before = tensors(tmp_path / "saved"), tensors(base[0])
    assert saved.keys() - before.keys() == {name for name in saved if name.startswith(("start", "end", "mixing"))}
    assert not before.keys() - saved.keys()
    assert all(torch.equal(saved[name][: len(before[name])], before[name]) for name in before)
    with torch.no_grad():
        wanted = model(text, thought_tokens=thoughts[:, :1]).logits
        for load in (QuietStarForCausalLM, AutoModelForCausalLM):
            loaded = load.from_pretrained(tmp_path / "saved")
            assert isinstance(loaded, QuietStarForCausalLM)
            assert torch.equal(loaded(text, thought_tokens=thoughts[:, :1]).logits, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, text, thoughts, reentrant):
    def gradients():
        model.zero_grad()
        model.train()(text, labels=text, thought_tokens=thoughts).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    before = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for actual, expected in zip(gradients(), before, strict=True):
        torch.testing.assert_close(actual, expected)


def test_hidden_states_are_those_of_the_family(base, model, text, thoughts):
    expected = base[1](text, output_hidden_states=True).hidden_states
    output = model(text, thought_tokens=thoughts[:, :1], output_hidden_states=True)
    for ours, theirs in zip(output.hidden_states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        ours.retain_grad()
    output.logits.sum().backward()
    assert all(states.grad.any() for states in output.hidden_states)
