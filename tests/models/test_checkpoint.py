"""Checkpoints: from an ordinary Mistral, ours, and the authors' layout."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from quietstar import QuietStarForCausalLM

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
    assert (model.config.thought_length, model.config.vocab_size) == (5, 32)
    assert not model.mixing_head[-1].weight.any()
    for embedding in (model.start_embedding(), model.end_embedding()):
        torch.testing.assert_close(embedding, mistral.model.embed_tokens.weight[7])
    text = torch.randint(0, 30, (1, 6))
    with torch.no_grad():
        torch.testing.assert_close(model(text).logits[..., :30], mistral(text).logits)


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
    with pytest.raises(ValueError, match="name_or_path must be a Mistral checkpoint, got model type 'quietstar'"):
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
    with pytest.raises(ValueError, match=r"no config\.json"):
        QuietStarForCausalLM.from_pretrained(empty)


def test_a_missing_tensor_is_an_error(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["mixing_head.0.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks mixing_head\.0\.bias"):
        QuietStarForCausalLM.from_pretrained(tmp_path)
