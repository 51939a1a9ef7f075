"""Decoders that cannot think are refused by name, and those that nobody has tried are compared with themselves."""

import pytest
import torch
import transformers
from decoder_families import FAMILIES, SIZES, decoder_of
from tokenizers import Tokenizer, models
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.models.families import FAMILIES as NAMED
from quietstar.models.families import UnsupportedFamilyError, new_decoder

THINKING = {"thought_length": 1, "lookahead": 1, "num_thoughts": 1}

# Class names of configurations without their end, their fields, and the reason.
REFUSED = {
    "BERT": ("Bert", {}, "but for bert, cls"),
    "a bias in the head": ("Phi", {}, "but for lm_head.bias"),
    "attention in chunks": ("Llama4Text", {}, "attention_chunk_size"),
    "another name for the decoder": ("GPTNeoX", {}, "but for gpt_neox, model"),
    "both directions": ("Gemma3Text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "encoder and decoder": ("T5", {}, "AttentionInterface"),
    "linear attention": ("MiniMax", {}, "layers of type linear_attention"),
    "loss of the router": ("Mixtral", {"output_router_logits": True}, "output_router_logits"),
    "MLA": ("DeepseekV3", {}, "kv_lora_rank"),
    "multiplied logits": ("Cohere", {}, "logit_scale"),
    "no attention": ("Mamba", {}, "AttentionInterface"),
    "several models": ("Gemma3", {}, "it is made of several models"),
    "sinks": ("GptOss", {"num_local_experts": 2}, "sinks"),
}


def test_the_families_that_are_named_are_those_that_are_tested():
    assert {decoder_of(family).config.model_type for family in FAMILIES} == set(NAMED)


@pytest.mark.parametrize(("kind", "fields", "reason"), REFUSED.values(), ids=REFUSED)
def test_decoders_that_cannot_think_are_named(tmp_path, kind, fields, reason):
    sizes = {} if kind in ("Gemma3", "T5", "Mamba") else SIZES
    config = getattr(transformers, f"{kind}Config")(**sizes | fields)
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedFamilyError) as refused:
        QuietStarForCausalLM.from_base(tmp_path, initial_token_ids=[5])
    message = str(refused.value)
    assert message.startswith(f"name_or_path must be a decoder that can think, got model type {config.model_type!r}: ")
    assert reason in message
    assert message.endswith(f"Tested are {', '.join(NAMED)}")


@pytest.mark.parametrize("name", ["linear attention", "MLA", "sinks"])
def test_they_are_refused_without_a_base_too(name):
    kind, fields, reason = REFUSED[name]
    config = QuietStarConfig(text_config=getattr(transformers, f"{kind}Config")(**SIZES | fields))
    with pytest.raises(UnsupportedFamilyError, match=f"text_config must be a decoder .*{reason}"):
        QuietStarForCausalLM(config)


@pytest.fixture
def llama(tmp_path):
    decoder_of("Llama").save_pretrained(tmp_path)
    return tmp_path


def own_logits(monkeypatch):
    def forward(*args, forward=LlamaForCausalLM.forward, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.05
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    return "its own logits differ from those of a thinking model by 0.048 of their size"


def lost_keywords(monkeypatch):
    def forward(*args, forward=modeling_llama.LlamaAttention.forward, thoughts=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    return "layers around LlamaAttention must hand on keyword arguments"


def unknown_keyword(monkeypatch):
    def forward(*args, forward=modeling_llama.LlamaAttention.forward, **kwargs):
        return forward(*args, **kwargs, position_bias=torch.ones(1))

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    return "attention of LlamaAttention must be plain to think, got position_bias"


@pytest.mark.parametrize("peculiar", [own_logits, lost_keywords, unknown_keyword])
def test_what_a_family_does_besides_is_found(monkeypatch, llama, peculiar):
    message = peculiar(monkeypatch)
    with pytest.raises(UnsupportedFamilyError, match=message):
        QuietStarForCausalLM.from_base(llama, initial_token_ids=[5], **THINKING)


def test_a_layout_that_is_not_heard_is_found(monkeypatch, llama):
    """Plain causal attention over all rows, the same for text and the first thought."""
    ours = ALL_ATTENTION_FUNCTIONS["quietstar"]

    def deaf(module, query, key, value, mask, thoughts=None, **kwargs):
        return ours(module, query, key, value, None, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "quietstar", deaf)
    with pytest.raises(UnsupportedFamilyError, match="its own logits differ"):
        QuietStarForCausalLM.from_base(llama, initial_token_ids=[5], **THINKING)


def test_a_tokenizer_of_another_model(llama):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(70)})))
    with pytest.raises(ValueError, match="tokenizer must be that of the model, whose vocabulary has 61 tokens"):
        QuietStarForCausalLM.from_base(llama, tokenizer, initial_token_ids=[5], **THINKING)
    assert len(tokenizer) == 70


def test_fields_of_the_base_may_be_overridden(llama):
    model = QuietStarForCausalLM.from_base(llama, initial_token_ids=[5], max_position_embeddings=64, **THINKING)
    assert model.config.text_config.max_position_embeddings == model.config.max_position_embeddings == 64
    assert AutoConfig.from_pretrained(llama).max_position_embeddings == 128


def test_a_base_that_is_given_keeps_its_attention():
    base = decoder_of("Llama")
    QuietStarForCausalLM(QuietStarConfig(text_config=base.config))
    assert base.config._attn_implementation == "eager"


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_embeddings_that_change_with_the_length_of_the_text(rope_type):
    """Up to a length they do not; behind it thoughts would be seen differently than alone."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6} if rope_type == "longrope" else {"factor": 2.0}
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "original_max_position_embeddings": 16, **factors}
    text_config = decoder_of("Llama", max_position_embeddings=16, rope_parameters=rope).config
    model = QuietStarForCausalLM(QuietStarConfig(text_config=text_config, **THINKING))
    thoughts = torch.ones(1, 1, 13, 1, dtype=torch.int64)
    model(thoughts[0, :, :, 0], thought_tokens=thoughts)
    with pytest.raises(ValueError, match="position_ids of text and thoughts must be below 16"):
        model(torch.ones(1, 14, dtype=torch.int64), thought_tokens=torch.ones(1, 1, 14, 1, dtype=torch.int64))


def test_configurations_that_have_no_decoder():
    with pytest.raises(UnsupportedFamilyError, match="transformers has no decoder of it"):
        new_decoder(transformers.PreTrainedConfig())


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_continuous_batching_is_refused(family):
    text_config = decoder_of(family).config
    ids = {"start_thought_token_id": 59, "end_thought_token_id": 60}
    model = QuietStarForCausalLM(QuietStarConfig(text_config=text_config, **THINKING, **ids)).eval()
    with pytest.raises(ValueError, match="quietstar"):  # transformers' own words
        model.generate_batch([[1, 2, 3]])
    assert model.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=2).shape == (1, 5)
