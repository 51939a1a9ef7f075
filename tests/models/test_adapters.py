"""Adapters (PEFT) on layers whose weight the ops read: they count, or are refused."""

import pytest
import torch
from torch import nn

from quietstar.models.weights import weight_of

peft = pytest.importorskip("peft")

ADAPTERS = {
    "lora on lm_head": {"target_modules": ["lm_head"]},
    "lora on all linear layers": {"target_modules": "all-linear"},
    "lora on the mixing head": {"target_modules": ["mixing_head.0", "mixing_head.2"]},
    "lm_head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "mixing head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["mixing_head"]},
    "thought embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["start_embedding", "end_embedding"]},
}


@pytest.fixture
def thoughts():
    return torch.randint(1, 38, (2, 2, 12, 3))


def adapted(model, **options):
    """The model with an adapter that has been trained: its weights are random."""
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return adapter


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_count(make_model, text, thoughts, options):
    model = make_model()
    before = float(model(text, labels=text, thought_tokens=thoughts).loss.detach())
    adapter = adapted(model, **options)
    output = adapter(text, labels=text, thought_tokens=thoughts)
    output.loss.backward()
    idle = [name for name, p in adapter.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []
    assert abs(float(output.loss.detach()) - before) > 1e-3
    with torch.no_grad():
        logits = adapter(text, thought_tokens=thoughts[:, :1]).logits
        drawn = adapter.sample_thoughts(text, temperature=0.0)
        with adapter.disable_adapter():
            unadapted = adapter(text, labels=text, thought_tokens=thoughts).loss
        assert float(unadapted) == pytest.approx(before, rel=1e-5)
        merged = adapter.merge_and_unload()
        expected = merged(text, labels=text, thought_tokens=thoughts).loss
        torch.testing.assert_close(output.loss.detach(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, merged(text, thought_tokens=thoughts[:, :1]).logits, rtol=1e-3, atol=1e-3)
        assert torch.equal(drawn, merged.sample_thoughts(text, temperature=0.0))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"lora_dropout": 0.1}, "lm_head must have LoRA without dropout, got lora_dropout = 0.1"),
        ({"use_dora": True}, "lm_head must have LoRA in its plain form, got a variant"),
    ],
    ids=["dropout", "DoRA"],
)
def test_adapters_that_are_no_matrix_are_refused(make_model, text, options, problem):
    adapter = adapted(make_model(), target_modules=["lm_head"], **options).train()
    with pytest.raises(ValueError, match=problem):
        adapter(text, labels=text)
    if "lora_dropout" in options:  # which is no dropout in evaluation
        assert adapter.eval()(text, labels=text).loss.isfinite()


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "layer", [Doubling(4, 6, bias=False), nn.Sequential(nn.Linear(4, 6))], ids=["subclass", "other"]
)
def test_a_layer_that_does_more_than_multiply_is_refused(layer):
    with pytest.raises(ValueError, match=rf"lm_head must be a torch.nn.Linear .* got {type(layer).__name__}"):
        weight_of("lm_head", layer)


def test_a_quantised_head_is_refused(make_model, text):
    model = make_model()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"lm_head must be a torch\.nn\.Linear"):
        model(text, labels=text)


def test_autocast_casts_the_head_once_per_step(make_model, text, monkeypatch):
    """Not once for every sampled token and loss."""
    model, casts = make_model(), []
    to = torch.Tensor.to

    def counting(tensor, *args, **kwargs):
        result = to(tensor, *args, **kwargs)
        if tensor.shape == model.lm_head.weight.shape and result.dtype != tensor.dtype:
            casts.append(tensor.dtype)
        return result

    monkeypatch.setattr(torch.Tensor, "to", counting)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(text, labels=text)
    assert casts == [torch.float32]
