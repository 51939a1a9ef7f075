"""``quietstar export``: the base model alone, as its family's own class saves it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from quietstar import QuietStarForCausalLM
from quietstar.cli import main
from quietstar.models.export import export_base

VOCABULARY = 32
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
FAMILIES = {
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "tied llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "experts": MixtralConfig(**SIZES, num_local_experts=4),
    "more experts": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8),
    "capped": Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8),
}


def make_base(folder, config=FAMILIES["mistral"], words=VOCABULARY):
    """A folder with a random base model and a tokenizer of so many words."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocabulary = {f"w{i}": i for i in range(words)} | {"---": 7}
    del vocabulary["w7"]
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0", eos_token="w1")
    tokenizer.save_pretrained(folder)
    return tokenizer


def think(base, folder, tokenizer, **fields):
    """A folder with the Quiet-STaR model that starts from a base, which is returned."""
    model = QuietStarForCausalLM.from_base(base, tokenizer=tokenizer, thought_length=2, **fields)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def contents(folder):
    """What the files of a folder say."""
    files = {file.name: json.loads(file.read_text()) for file in folder.glob("*.json")}
    files["generation_config.json"].pop("_from_model_config", None)
    for name in ("is_local", "local_files_only", "model_max_length"):  # from where the tokenizer was loaded
        files["tokenizer_config.json"].pop(name, None)
    return files


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_has_learnt_nothing_is_its_base_again(tmp_path, capsys, family):
    base, ours, out = (tmp_path / name for name in ("base", "ours", "out"))
    think(base, ours, make_base(base, FAMILIES[family]))
    assert main(["export", str(ours), "--base", str(out)]) == 0
    assert contents(out) == contents(base)
    expected, actual = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    printed = capsys.readouterr()
    assert f"of type {FAMILIES[family].model_type}, with {VOCABULARY} tokens, in float32" in printed.out
    assert "thoughts stay behind" in printed.err
    assert "has no thoughts" in (out / "README.md").read_text()


@pytest.mark.parametrize("family", ["mistral", "capped"])
def test_it_predicts_what_the_model_predicts_without_thoughts(tmp_path, family):
    base, ours, out = (tmp_path / name for name in ("base", "ours", "out"))
    model = think(base, ours, make_base(base, FAMILIES[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as if it had been trained
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        text = torch.randint(2, VOCABULARY, (2, 9))
        wanted = model.predictor().logits(model(text, output_hidden_states=True).hidden_states[-1])
        generated = model.generate(text, think="never", max_new_tokens=8, do_sample=False)
    assert export_base(model, None, out) == VOCABULARY
    plain = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        torch.testing.assert_close(plain(text).logits, wanted[..., :VOCABULARY], rtol=1e-5, atol=1e-5)
        assert torch.equal(plain.generate(text, max_new_tokens=8, do_sample=False), generated)


@pytest.mark.slow
def test_it_loads_without_quietstar(tmp_path):
    base, ours, out = (tmp_path / name for name in ("base", "ours", "out"))
    think(base, ours, make_base(base))
    assert main(["export", str(ours), "--base", str(out)]) == 0
    code = """
import sys
sys.modules["quietstar"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
print(type(model).__name__, len(tokenizer))
"""
    command = [sys.executable, "-c", code, str(out)]
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # or PyTorch imports quietstar's plugin
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert printed.split() == ["MistralForCausalLM", str(VOCABULARY)]


def test_thought_tokens_in_the_padding_of_the_vocabulary(tmp_path):
    """A model may have more rows than its tokenizer has tokens: thought tokens take some, and no row is added."""
    base, ours, out = (tmp_path / name for name in ("base", "ours", "out"))
    model = think(base, ours, make_base(base, words=29))
    assert model.config.thought_token_ids == (29, 30)
    assert main(["export", str(ours), "--base", str(out)]) == 0
    files = contents(out)
    assert files["config.json"]["vocab_size"] == VOCABULARY
    assert files["generation_config.json"].pop("suppress_tokens") == [29, 30]
    assert files == contents(base)
    assert len(AutoTokenizer.from_pretrained(out)) == 29


@pytest.mark.parametrize(
    ("known", "tokens", "rows", "size"),
    [(32, 0, 34, 32), (None, 0, 34, 32), (32, 3, 37, 37), (None, 3, 37, 37), (32, 0, 64, 32), (None, 0, 64, 64)],
)
def test_how_many_tokens_the_base_had(tmp_path, known, tokens, rows, size):
    """Also where it is not known, and where the user has added tokens or padding behind those of thoughts."""
    base, ours, out = (tmp_path / name for name in ("base", "ours", "out"))
    model = think(base, ours, tokenizer := make_base(base), base_vocab_size=known)
    tokenizer.add_tokens([f"new{i}" for i in range(tokens)])
    model.resize_token_embeddings(rows)
    model.generation_config.think = "never"
    assert export_base(model, tokenizer, out) == size
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.get_input_embeddings().num_embeddings == size
    words = AutoTokenizer.from_pretrained(out).get_vocab()
    if tokens:  # which would get other numbers without thought tokens in front of them
        assert words == tokenizer.get_vocab()
    else:
        assert words == {text: i for text, i in tokenizer.get_vocab().items() if "thought" not in text}
    assert plain.generation_config.suppress_tokens == ([32, 33] if size > 32 else None)
    assert not hasattr(plain.generation_config, "think")


def test_files_that_only_the_first_checkpoint_had_are_not_named(tmp_path):
    base, ours, out = (tmp_path / name for name in ("base", "ours", "out"))
    tokenizer = make_base(base)
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_mistral.MistralConfig"}
    (base / "config.json").write_text(json.dumps(config))
    think(base, ours, tokenizer)
    assert main(["export", str(ours), "--base", str(out)]) == 0
    assert "auto_map" not in contents(out)["config.json"]


def test_a_quantised_model_is_refused(make_model, tmp_path):
    model = make_model()
    model.is_quantized = True
    with pytest.raises(ValueError, match="model must not be quantised"):
        export_base(model, None, tmp_path / "out")


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    base, ours = tmp_path / "base", tmp_path / "ours"
    think(base, ours, make_base(base))
    before = sorted(base.iterdir())
    (tmp_path / "file").touch()
    taken_by = {base: "which holds config.json", ours: "which holds README.md", tmp_path / "file": "a file"}
    for taken, found in taken_by.items():
        assert main(["export", str(ours), "--base", str(taken)]) == 2
        assert f"--base must be a new or an empty folder, got {taken}, {found}" in capsys.readouterr().err
    assert sorted(base.iterdir()) == before
    (tmp_path / "empty").mkdir()
    assert main(["export", str(ours), "--base", str(tmp_path / "empty")]) == 0


def test_what_cannot_be_loaded(tmp_path, capsys):
    base = tmp_path / "base"
    make_base(base)
    for name, problem in ((base, "must be a Quiet-STaR checkpoint"), (tmp_path / "nothing", "nothing")):
        assert main(["export", str(name), "--base", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert f"quietstar export: cannot load {name}: " in message
        assert problem in message
    assert not (tmp_path / "out").exists()
