"""Adapters (LoRA): the helper, the trainer, and the flags of the command."""

import json
import re
import shutil
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM
from versions import version_of

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.cli import main
from quietstar.models.adapters import load_merged
from quietstar.training import lora_config
from quietstar.training.arguments import ModelArguments, TrainParser
from quietstar.training.lora import four_bits
from quietstar.training.train import load_model

peft = pytest.importorskip("peft")

PARTS = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
WHOLE = "start_embedding", "end_embedding", "mixing_head"


def probe(model):
    """Logits of a text after given thoughts."""
    text = torch.arange(1, 9)[None]
    thoughts = torch.arange(8).view(1, 1, 8, 1) + torch.arange(2) + 3
    with torch.no_grad():
        return model.eval()(input_ids=text, thought_tokens=thoughts).logits


def test_the_configuration_is_of_attention_mlp_and_what_quiet_star_adds(make_model):
    config = lora_config(make_model(), r=4)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0)
    assert set(config.target_modules) == set(PARTS)
    assert set(config.modules_to_save) == set(WHOLE)
    assert set(lora_config(make_model(gain_weight=1.0)).modules_to_save) == {*WHOLE, "gain_head"}
    config = lora_config(make_model(), 4, 3, 0.1, target_modules=["q_proj"], use_rslora=True)
    assert (config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 0.1, True)
    assert set(config.target_modules) == {"q_proj"}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_trainer_trains_adapters_and_nothing_else(make_model, make_trainer, gradient_checkpointing):
    model = make_model()
    adapted = peft.get_peft_model(model, lora_config(model, r=4))
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    make_trainer(adapted, max_steps=2, gradient_checkpointing=gradient_checkpointing, weight_decay=0).train()
    moved = {name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert len(moved) == 2 * len(PARTS) * 2 + 7  # two matrices each, two layers; two embeddings and the head's tensors


def test_a_gain_head_is_trained_saved_and_asked_with_the_adapters(make_model, make_trainer, tmp_path):
    make_model(gain_weight=1.0).save_pretrained(tmp_path / "base")
    model = QuietStarForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, lora_config(model, r=4))
    trainer = make_trainer(adapted, max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    merged, text = load_merged(tmp_path / "adapter"), torch.arange(1, 9)[None]
    assert merged.gain_head[-1].weight.any()
    with torch.no_grad():
        expected = merged.gain_head(merged.model(text).last_hidden_state[:, -1])
    for each in (adapted, merged):
        for above in (-1e-4, 1e-4):
            options = {"gain_threshold": float(expected) - above, "max_new_tokens": 1, "pad_token_id": 0}
            output = each.eval().generate(input_ids=text, think="learned", return_thoughts=True, **options)
            assert bool(output.thinks) == (above > 0)


@pytest.fixture
def adapter(make_model, make_trainer, tmp_path):
    """A folder with a trained adapter, beside that of its model, and what ``probe`` gives of both together."""
    make_model().save_pretrained(tmp_path / "base")
    model = QuietStarForCausalLM.from_pretrained(tmp_path / "base")
    trainer = make_trainer(peft.get_peft_model(model, lora_config(model, r=4)), max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    return tmp_path / "adapter", probe(trainer.model)


def test_adapters_are_saved_loaded_and_merged(make_model, adapter):
    folder, expected = adapter
    saved = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name or any(part in name for part in WHOLE) for name in saved)
    assert not torch.allclose(expected, probe(make_model()))
    base = QuietStarForCausalLM.from_pretrained(folder.parent / "base")
    load_merged(folder).save_pretrained(folder.parent / "merged")
    for model in (
        peft.PeftModel.from_pretrained(base, folder),
        peft.AutoPeftModelForCausalLM.from_pretrained(folder),
        load_merged(folder),
        QuietStarForCausalLM.from_pretrained(folder.parent / "merged"),
    ):
        torch.testing.assert_close(probe(model), expected, rtol=1e-4, atol=1e-5)


def test_transformers_loads_adapters_or_says_no(adapter):
    folder, expected = adapter
    if version_of("transformers") < (5, 18):  # older versions do not load what is trained as a whole
        with pytest.raises(ValueError, match=r"lacks end_embedding\.modules_to_save\.default\.weight"):
            AutoModelForCausalLM.from_pretrained(folder)
    else:
        torch.testing.assert_close(probe(AutoModelForCausalLM.from_pretrained(folder)), expected)


@pytest.mark.parametrize("start", ["mistral", "ours", "ours, other fields"])
def test_the_command_trains_adapters_that_all_commands_take(run, base, tmp_path, capsys, start):
    out, kept, go = tmp_path / "out", tmp_path / "out" / "base_model", run
    flags = ["--lora_r", 4, "--save_steps", 2, "--max_steps", 2]
    if start != "mistral":
        model, tokenizer = load_model(ModelArguments(str(base), thought_length=2, num_thoughts=1, lookahead=3))
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / "ours")
        flags += ["--model", tmp_path / "ours"]
    if start == "ours":  # without the fields that the fixture sets
        kept = tmp_path / "ours"
        sizes = "--block_size 10 --per_device_train_batch_size 2 --report_to none --use_cpu --disable_tqdm true"
        flags += [*sizes.split(), "--data", tmp_path / "text.jsonl", "--output_dir", out]
        go = lambda *flags: main(["train", *map(str, flags)])  # noqa: E731
    assert go(*flags) == 0
    assert QuietStarConfig.from_pretrained(kept).thought_length == 2
    assert (out / "base_model").exists() == (start != "ours")
    assert not (out / "model.safetensors").exists()
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(kept)

    expected = probe(load_merged(out))
    torch.testing.assert_close(
        probe(peft.AutoPeftModelForCausalLM.from_pretrained(out)), expected, rtol=1e-4, atol=1e-5
    )
    assert not torch.equal(expected, probe(QuietStarForCausalLM.from_pretrained(kept)))
    torch.testing.assert_close(probe(load_merged(out / "checkpoint-2")), expected)
    if start != "ours":  # the folder is moved with the model beside the adapter
        shutil.move(out, tmp_path / "moved")
        torch.testing.assert_close(probe(load_merged(tmp_path / "moved")), expected)
        torch.testing.assert_close(probe(load_merged(tmp_path / "moved" / "checkpoint-2")), expected)
        out = tmp_path / "moved"
    capsys.readouterr()
    assert main(["generate", "--model", str(out), "--prompt", "w1 w2", "--max_new_tokens", "3"]) == 0
    assert len(capsys.readouterr().out.split()) == 5
    assert run("--model", out, "--output_dir", tmp_path / "other") == 2
    assert "model must be a checkpoint, got an adapter in" in capsys.readouterr().err


def test_adapters_killed_and_resumed_are_the_same(run, tmp_path):
    flags = "--lora_r", 4, "--lora_dropout", 0.1, "--lora_alpha", 3, "--eval_strategy", "no"
    assert run(*flags) == 0
    out = tmp_path / "out"
    whole = load_file(out / "adapter_model.safetensors")
    shutil.rmtree(out / "checkpoint-4")
    assert run(*flags, "--resume_from_checkpoint", "last") == 0
    resumed = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_r", "0"], "lora_r must be an integer >= 1, got 0"),
        (["--lora_r", "4", "--lora_alpha", "0"], r"lora_alpha must be > 0, got 0\.0"),
        (["--lora_r", "4", "--lora_dropout", "1"], r"lora_dropout must be in \[0, 1\), got 1\.0"),
        (["--lora_alpha", "4"], r"lora_alpha must be left out without lora_r, got 4\.0"),
        (["--load_in_4bit"], "load_in_4bit must be left out without lora_r, got True"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_make_no_sense(capsys, flags, message):
    with pytest.raises(SystemExit, match=r"^2$"):
        TrainParser().parse(["--model", "m", "--data", "d", *flags])
    assert re.search(f"error: {message}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "package", "extra"),
    [(["--lora_r", 4], "peft", "peft"), (["--lora_r", 4, "--load_in_4bit"], "bitsandbytes", "qlora")],
    ids=["peft", "bitsandbytes"],
)
def test_a_missing_package_is_named_before_anything_is_read(run, capsys, monkeypatch, tmp_path, flags, package, extra):
    def without(name):
        if name == package:
            raise ModuleNotFoundError(name=package)
        return import_module(name)

    monkeypatch.setattr("quietstar._packages.import_module", without)
    assert run("--model", tmp_path / "none", *flags) == 2
    assert f'needs the package {package}: pip install "quietstar[{extra}]"' in capsys.readouterr().err


def test_a_model_is_not_written_over_itself(run, base, tmp_path, capsys):
    model, tokenizer = load_model(ModelArguments(str(base)))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "out" / "base_model")
    assert run("--model", tmp_path / "out" / "base_model", "--lora_r", 4) == 2
    assert "output_dir must not be the folder around model with other fields" in capsys.readouterr().err


def test_other_models_and_ranks_are_refused(make_model):
    with pytest.raises(TypeError, match="model must be a QuietStarForCausalLM, got Linear"):
        lora_config(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="r must be an integer >= 1, got 0"):
        lora_config(make_model(), r=0)


def test_adapters_without_a_model_are_refused(make_model, tmp_path):
    adapted = peft.get_peft_model(make_model(), lora_config(make_model(), r=2))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an adapter must name the model that it is for, got none in"):
        load_merged(tmp_path)


@pytest.fixture
def wide(base):
    """A base model of the sizes that bitsandbytes takes, in blocks of 32."""
    config = MistralConfig(
        vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=None,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(base)
    return base


def test_4_bits_train_below_adapters(run, wide, tmp_path):
    pytest.importorskip("bitsandbytes")
    assert run("--lora_r", 4, "--load_in_4bit", "--gradient_checkpointing", "--max_steps", 2) == 0
    out = tmp_path / "out"
    assert probe(load_merged(out)).isfinite().all()
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|startthought|>") == 30
    assert not torch.equal(probe(load_merged(out)), probe(QuietStarForCausalLM.from_pretrained(out / "base_model")))


def test_4_bits_train_after_an_evaluation(wide, make_trainer):
    """On a CPU bitsandbytes lays out anew what was evaluated, and then gives no gradients."""
    pytest.importorskip("bitsandbytes")

    def load():
        options = {"thought_length": 2, "lookahead": 1, "num_thoughts": 1, "initial_token_ids": [0]}
        model = QuietStarForCausalLM.from_base(
            wide, quantization_config=four_bits(torch.float32), device_map="cpu", **options
        )
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return peft.get_peft_model(model, lora_config(model, r=2))

    adapted = load()
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    trainer = make_trainer(adapted, max_steps=2)
    trainer.evaluate()
    trainer.train()
    still = {name for name, p in adapted.named_parameters() if p.requires_grad and torch.equal(p, before[name])}
    assert not {name for name in still if "lora_" in name}

    adapted = load()
    probe(adapted)
    layer = adapted.get_base_model().model.layers[0].mlp.up_proj
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        with pytest.raises(ValueError, match=r"must not have been evaluated on a CPU .*: load it anew, .* no grad"):
            make_trainer(adapted)
