"""Checkpoints: from an ordinary Mistral, ours, and the authors' layout."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from quietstar import QuietStarConfig, QuietStarForCausalLM

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
AUTHORS_CONFIG = SIZES | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 40, "rope_theta": 10000.0,
    "sliding_window": 4096, "max_thoughts": 8, "merged_talk_heads": True, "merged_lm_and_talk_heads": False,
    "merged_lm_and_think_heads": True, "use_concat_talk_head": True, "use_shallow_think": True,
    "use_shallow_talk": False, "use_complex_think_head": False, "use_complex_talk_head": True,
    "use_weighted_talk_head": True, "torch_dtype": "float32",
}  # fmt: skip


@pytest.fixture
def base(tmp_path):
    """A folder with an ordinary Mistral of 30 tokens and a tokenizer whose token 7 is "---"."""
    model = MistralForCausalLM(MistralConfig(vocab_size=30, sliding_window=None, **SIZES))
    model.save_pretrained(tmp_path)
    words = {f"w{i}": i for i in range(30) if i != 7} | {"---": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(tmp_path)
    return tmp_path, model


def test_from_base(base):
    folder, mistral = base
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = QuietStarForCausalLM.from_base(folder, tokenizer=tokenizer, thought_length=5)
    assert model.config.thought_token_ids == (30, 31)
    assert tokenizer.convert_tokens_to_ids(["<|startthought|>", "<|endthought|>"]) == [30, 31]
    assert (model.config.base_model_name_or_path, model.config.base_vocab_size) == (str(folder.resolve()), 30)
    assert (model.config.thought_length, model.config.vocab_size) == (5, 32)
    assert not model.mixing_head[-1].weight.any()
    for embedding in (model.start_embedding(), model.end_embedding()):
        torch.testing.assert_close(embedding, mistral.model.embed_tokens.weight[7])
    text = torch.randint(0, 30, (1, 6))
    with torch.no_grad():
        torch.testing.assert_close(model(text).logits[..., :30], mistral(text).logits)


def test_from_base_with_a_gain_head_thinks_nowhere_before_training(base):
    folder, mistral = base
    model = QuietStarForCausalLM.from_base(folder, gain_weight=0.5, think="learned")
    text = torch.randint(0, 30, (1, 6))
    with torch.no_grad():
        assert not model.gain_head(model.model(text).last_hidden_state).any()
    said = model.generate(text, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(
        said, mistral.generate(text, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    )


@pytest.mark.parametrize("tokens", [[7], [3, 5]], ids=str)
def test_at_first_a_learned_end_is_as_likely_as_what_its_embedding_is_from(base, tokens):
    folder, mistral = base
    model = QuietStarForCausalLM.from_base(folder, initial_token_ids=tokens, learned_thought_end=True)
    torch.testing.assert_close(model.lm_head.weight[31], mistral.lm_head.weight[tokens].mean(0))
    assert torch.equal(model.lm_head.weight[:30], mistral.lm_head.weight)


def test_from_base_without_a_tokenizer_needs_initial_tokens(base):
    folder, mistral = base
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="tokenizer or initial_token_ids must be given"):
        QuietStarForCausalLM.from_base(folder)
    model = QuietStarForCausalLM.from_base(folder, initial_token_ids=[3, 5])
    torch.testing.assert_close(model.start_embedding(), mistral.model.embed_tokens.weight[[3, 5]].mean(0))


def test_from_base_refuses_other_models(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a decoder that can think, got model type 'quietstar': it thinks already"):
        QuietStarForCausalLM.from_base(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitwise(make_model, tmp_path, dtype):
    model = make_model(thought_length=4, embedding_scale=50.0).to(dtype)
    model.save_pretrained(tmp_path)
    for load in (QuietStarForCausalLM, AutoModelForCausalLM):
        loaded = load.from_pretrained(tmp_path)
        assert isinstance(loaded, QuietStarForCausalLM)
        volatile = ("_name_or_path", "architectures", "dtype", "transformers_version")
        configs = [{k: v for k, v in m.config.to_dict().items() if k not in volatile} for m in (loaded, model)]
        assert configs[0] == configs[1]
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
            assert loaded.state_dict()[name].dtype == dtype
    assert loaded.config.thought_length == 4
    assert QuietStarForCausalLM.from_pretrained(tmp_path, thought_length=2).config.thought_length == 2


def authors_folder(model, folder, **changes):
    """Save a model as the authors' code would."""
    names = {"mixing_head.": "talk_head.0."}
    weights = {}
    for name, tensor in model.state_dict().items():
        if name in ("start_embedding.weight", "end_embedding.weight"):
            weights[name.removesuffix(".weight")] = torch.stack([tensor, torch.zeros_like(tensor)])
        else:
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            weights[name] = tensor.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(AUTHORS_CONFIG | changes))


def in_other_files(folder, kind):
    """Save the tensors of a folder again: in "shards", "pickled" or in "pickled shards"."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, ending, save = "model", "safetensors", save_file
    if "pickled" in kind:
        stem, ending, save = "pytorch_model", "bin", torch.save
    files = dict.fromkeys(weights, f"{stem}.{ending}")
    if "shards" in kind:
        files = {name: f"{stem}-0000{i % 2}.{ending}" for i, name in enumerate(weights)}
        index = {"metadata": {}, "weight_map": files}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    for file in set(files.values()):
        save({name: tensor for name, tensor in weights.items() if files[name] == file}, folder / file)


def test_authors_layout(make_model, tmp_path, text):
    model = make_model(sliding_window=4096, thought_length=3)
    authors_folder(model, tmp_path)
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.thought_length == 3  # 8 = 3 + 1 + 4
    assert loaded.config.thought_token_ids == (38, 39)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    thoughts = torch.randint(0, 38, (2, 1, 12, 3))
    torch.testing.assert_close(
        loaded(text, thought_tokens=thoughts).logits, model(text, thought_tokens=thoughts).logits
    )
    assert QuietStarForCausalLM.from_pretrained(tmp_path, lookahead=4).config.lookahead == 4


def test_authors_layout_of_another_architecture_is_refused(make_model, tmp_path):
    authors_folder(make_model(), tmp_path, use_concat_talk_head=False)
    with pytest.raises(ValueError, match="use_concat_talk_head must be True"):
        QuietStarForCausalLM.from_pretrained(tmp_path)


def test_folders_that_hold_no_quiet_star_model(base, tmp_path):
    folder, _ = base
    with pytest.raises(ValueError, match="ours or the authors', got model type 'mistral'"):
        QuietStarForCausalLM.from_pretrained(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    for load in (QuietStarForCausalLM.from_pretrained, QuietStarForCausalLM.from_base):
        with pytest.raises(ValueError, match=r"no config\.json in .*empty, which is empty"):
            load(empty)
        with pytest.raises(ValueError, match=r"no config\.json in .*, only checkpoint-2, checkpoint-4"):
            load(_with_folders(tmp_path / "run", "checkpoint-4", "checkpoint-2"))


def _with_folders(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    return folder


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("load", [QuietStarForCausalLM, AutoModelForCausalLM])
def test_a_missing_tensor_is_an_error(make_model, tmp_path, load):
    make_model().save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop("mixing_head.0.bias"))
    with pytest.raises(ValueError, match=r"lacks mixing_head\.0\.bias"):
        load.from_pretrained(tmp_path)


def test_tensors_of_a_base_that_do_not_fit(base, monkeypatch):
    folder, _ = base
    warnings = []
    monkeypatch.setattr("quietstar.models.checkpoint.logger.warning", warnings.append)
    change_weights(folder, lambda weights: weights.update({"extra.weight": torch.zeros(2)}))
    QuietStarForCausalLM.from_base(folder)
    assert warnings == [f"{folder} holds tensors that are not used: extra.weight"]

    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.zeros(2)}))
    with pytest.raises(RuntimeError, match="mismatch"):
        QuietStarForCausalLM.from_base(folder)
    QuietStarForCausalLM.from_base(folder, ignore_mismatched_sizes=True)
    assert warnings[-1] == f"{folder} holds tensors of other shapes; random ones instead: model.norm.weight"

    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"name_or_path must hold every tensor .* lacks model\.norm\.weight"):
        QuietStarForCausalLM.from_base(folder)


@pytest.mark.parametrize("ids", [[], [30], [-1], [3, 1000], [1.5]])
def test_initial_tokens_are_tokens_of_the_base(base, ids):
    with pytest.raises(ValueError, match=r"initial_token_ids must be one or more token ids in \[0, 30\), got \["):
        QuietStarForCausalLM.from_base(base[0], initial_token_ids=ids)


DTYPES = [
    {}, {"dtype": None}, {"dtype": "auto"}, {"dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"dtype": torch.float16},
    {"dtype": "float32"}, {"torch_dtype": "auto"}, {"torch_dtype": torch.bfloat16}, {"torch_dtype": "float16"},
]  # fmt: skip


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", DTYPES, ids=str)
def test_the_dtype_is_that_of_a_plain_mistral(base, make_model, tmp_path, saved, asked):
    folder, mistral = base
    mistral.to(saved).save_pretrained(folder)
    expected = MistralForCausalLM.from_pretrained(folder, **asked).dtype
    ours, theirs = _with_folders(tmp_path, "ours", "theirs") / "ours", tmp_path / "theirs"
    make_model().to(saved).save_pretrained(ours)
    authors_folder(make_model().to(saved), theirs, torch_dtype=str(saved).removeprefix("torch."))
    for model in (
        QuietStarForCausalLM.from_base(folder, **asked),
        QuietStarForCausalLM.from_pretrained(ours, **asked),
        AutoModelForCausalLM.from_pretrained(ours, **asked),
        QuietStarForCausalLM.from_pretrained(theirs, **asked),
    ):
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert model.config.dtype == expected


@pytest.fixture
def hub(tmp_path, base, make_model):
    """A cache of the hub's: revisions main and old of three models, each in a subfolder, and how to find the old."""
    folder, _ = base
    cache = tmp_path / "cache"
    for revision, length in (("main", 3), ("old", 4)):
        for name in ("base", "ours", "theirs"):
            repository = cache / f"models--some--{name}"
            (_with_folders(repository, "refs") / "refs" / revision).write_text(revision * 8)
            target = repository / "snapshots" / (revision * 8) / "inner"
            target.mkdir(parents=True)
            if name == "ours":
                make_model(thought_length=length).save_pretrained(target)
            elif name == "theirs":
                authors_folder(make_model(thought_length=length), target, max_thoughts=length + 5)
                in_other_files(target, "shards")
            else:
                for file in folder.iterdir():
                    if file.is_file():
                        shutil.copy(file, target)
                MistralForCausalLM(MistralConfig(vocab_size=30 + length, **SIZES)).save_pretrained(target)
    return {"cache_dir": cache, "subfolder": "inner", "revision": "old", "local_files_only": True, "token": False}


def test_what_locates_a_checkpoint_reaches_all_of_it(hub):
    base = QuietStarForCausalLM.from_base("some/base", **hub)  # with the tokenizer, for "---"
    assert base.config.vocab_size == 36
    for name in ("some/ours", "some/theirs"):
        model = QuietStarForCausalLM.from_pretrained(name, **hub)
        assert model.config.thought_length == 4
        assert model.config.name_or_path == name
        assert QuietStarForCausalLM.from_pretrained(name, **hub | {"revision": "main"}).config.thought_length == 3
    with pytest.raises(OSError, match="find them in the cached files"):
        QuietStarForCausalLM.from_pretrained("some/ours", **hub | {"revision": "older"})


@pytest.mark.parametrize("name", ["base", "ours", "theirs"])
def test_subfolders_of_a_folder(hub, name):
    (folder,) = (hub["cache_dir"] / f"models--some--{name}").glob("snapshots/old*")
    load = QuietStarForCausalLM.from_base if name == "base" else QuietStarForCausalLM.from_pretrained
    assert isinstance(load(folder, subfolder="inner"), QuietStarForCausalLM)
    assert isinstance(load(str(folder), subfolder="inner"), QuietStarForCausalLM)


def test_a_configuration_can_be_given(base, make_model, tmp_path):
    folder, _ = base
    config = MistralConfig.from_pretrained(folder, rms_norm_eps=0.5)
    for given in (config, folder, str(folder)):
        model = QuietStarForCausalLM.from_base(folder, config=given)
        assert model.config.rms_norm_eps == (0.5 if given is config else 1e-6)
    ours = tmp_path / "ours"
    make_model().save_pretrained(ours)
    given = QuietStarConfig.from_pretrained(ours)
    given.thought_length = 1
    assert QuietStarForCausalLM.from_pretrained(ours, config=given).config.thought_length == 1
    assert QuietStarForCausalLM.from_pretrained(ours, config=ours).config.thought_length == 3
    with pytest.raises(TypeError, match="config must be a QuietStarConfig, got MistralConfig"):
        QuietStarForCausalLM.from_pretrained(ours, config=config)
    with pytest.raises(ValueError, match="thought_length must be an integer >= 0, got -1"):
        AutoModelForCausalLM.from_pretrained(ours, thought_length=-1)


def test_loading_info(base, make_model, tmp_path):
    folder, _ = base
    model, info = QuietStarForCausalLM.from_base(folder, output_loading_info=True)
    assert isinstance(model, QuietStarForCausalLM)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"start_embedding", "end_embedding", "mixing_head"}
    make_model().save_pretrained(tmp_path / "ours")
    model, info = QuietStarForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, torch.device("cpu")], ids=str)
def test_a_device_map_changes_nothing_on_one_device(base, make_model, tmp_path, device_map):
    pytest.importorskip("accelerate")
    folder, _ = base
    ours, theirs = _with_folders(tmp_path, "ours", "theirs") / "ours", tmp_path / "theirs"
    make_model().save_pretrained(ours)
    authors_folder(make_model(), theirs)
    for load, path in (
        (QuietStarForCausalLM.from_base, folder),
        (QuietStarForCausalLM.from_pretrained, ours),
        (QuietStarForCausalLM.from_pretrained, theirs),
    ):
        placed, plain = load(path, device_map=device_map, low_cpu_mem_usage=True), load(path)
        assert placed.mixing_head[-1].weight.any() == (load != QuietStarForCausalLM.from_base)
        if load == QuietStarForCausalLM.from_base:  # of the head only the last layer is not random
            assert all(parameter.isfinite().all() for parameter in placed.parameters())
            placed.mixing_head, plain.mixing_head = torch.nn.Identity(), torch.nn.Identity()
            for model in (placed, plain):  # the rows of the new tokens are random
                model.lm_head.weight.data[30:] = model.model.embed_tokens.weight.data[30:] = 0
        for name, tensor in plain.state_dict().items():
            assert torch.equal(placed.state_dict()[name], tensor), name


@pytest.mark.parametrize("offloaded", ["lm_head", "mixing_head"])
def test_what_is_read_by_its_weight_cannot_be_offloaded(make_model, tmp_path, offloaded):
    pytest.importorskip("accelerate")
    make_model().save_pretrained(tmp_path)
    parts = "model", "start_embedding", "end_embedding", "lm_head", "mixing_head"
    device_map = dict.fromkeys(parts, "cpu") | {offloaded: "disk"}
    with pytest.raises(ValueError, match=f"device_map must keep {offloaded}.* on a device, got it offloaded"):
        QuietStarForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")


@pytest.mark.parametrize("kind", ["shards", "pickled", "pickled shards"])
def test_authors_tensors_in_other_files(make_model, tmp_path, kind):
    model = make_model(thought_length=3)
    authors_folder(model, tmp_path)
    in_other_files(tmp_path, kind)
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
