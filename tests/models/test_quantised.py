"""Quantised models: what quantisers leave alone, thinking, and training adapters on top (QLoRA)."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig, MistralForCausalLM, TorchAoConfig

from quietstar import QuietStarForCausalLM
from quietstar.models.layers import ZeroLinear

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "sliding_window": None,
}  # fmt: skip
TEXT = torch.tensor([[5, 9, 3, 17, 21, 30, 8, 11]])


def bits(number, **options):
    def make():
        pytest.importorskip("bitsandbytes")
        return BitsAndBytesConfig(**{f"load_in_{number}bit": True}, **options)

    return make


def torchao(**options):
    def make():
        quantization = pytest.importorskip("torchao.quantization")
        return TorchAoConfig(quantization.Int8WeightOnlyConfig(), **options)

    return make


QUANTISERS = {
    "8 bit": bits(8),
    "4 bit": bits(4, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "4 bit, modules skipped": bits(4, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["k_proj"]),
    "torchao": torchao(),
    "torchao, modules skipped": torchao(modules_to_not_convert=["k_proj"]),
}


@pytest.fixture(params=QUANTISERS, ids=str)
def quantiser(request):
    return QUANTISERS[request.param]()


@pytest.fixture(params=["ours", "auto", "base"])
def load(request, make_model, tmp_path):
    """Loads the same model in one of three ways; keyword arguments go to it."""
    pytest.importorskip("accelerate")
    if request.param == "base":
        MistralForCausalLM(MistralConfig(**SIZES)).save_pretrained(tmp_path)
        options = {"initial_token_ids": [5], "thought_length": 2, "lookahead": 1, "num_thoughts": 1}
        return lambda **kwargs: QuietStarForCausalLM.from_base(tmp_path, **options, **kwargs)
    words = SIZES["vocab_size"]
    make_model(
        **SIZES, lookahead=1, num_thoughts=1, start_thought_token_id=words - 2, end_thought_token_id=words - 1
    ).save_pretrained(tmp_path)
    loader = QuietStarForCausalLM if request.param == "ours" else AutoModelForCausalLM
    return lambda **kwargs: loader.from_pretrained(tmp_path, **kwargs)


def is_plain(layer):
    return type(layer) in (torch.nn.Linear, ZeroLinear) and type(layer.weight) is torch.nn.Parameter


def test_layers_are_quantised_and_the_heads_are_not(load, quantiser):
    model = load(quantization_config=quantiser, device_map="cpu")
    assert not is_plain(model.model.layers[0].mlp.down_proj)
    assert is_plain(model.lm_head)
    assert all(is_plain(layer) for layer in list(model.mixing_head)[::2])
    assert model.generate(TEXT, max_new_tokens=3).shape == (1, 11)
    assert model(TEXT, labels=TEXT).loss.isfinite()


def test_the_heads_have_the_models_dtype(load):
    """What transformers keeps from quantisers it would keep in float32 too."""
    model = load(dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_a_quantised_head_is_refused(load):
    with pytest.raises(ValueError, match="quantization_config must leave lm_head as it is, got a Linear of Int8Tensor"):
        load(quantization_config=torchao(include_input_output_embeddings=True)(), device_map="cpu")


def test_a_saved_quantised_model_loads(load, tmp_path):
    model = load(quantization_config=QUANTISERS["8 bit"](), device_map="cpu")
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert is_plain(again.mixing_head[0])
    assert not is_plain(again.model.layers[0].mlp.down_proj)
    assert torch.equal(again.mixing_head[0].weight, model.mixing_head[0].weight)


@pytest.mark.parametrize("number", [4, 8])
def test_adapters_train_on_top(load, number):
    peft = pytest.importorskip("peft")
    quantiser = QUANTISERS[f"{number} bit"]()
    model = peft.prepare_model_for_kbit_training(load(quantization_config=quantiser, device_map="cpu"))
    heads = ["start_embedding", "end_embedding", "mixing_head"]
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=heads)
    )
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    for _ in range(2):  # the second matrix of an adapter starts at zero, and with it the gradient of the first
        adapted.train()(input_ids=TEXT, labels=TEXT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(adapted.named_parameters())
    still = [name for name, parameter in before.items() if torch.equal(parameter, after[name])]
    assert not [name for name in still if "lora_" in name or "mixing_head.modules_to_save.default.4" in name]
