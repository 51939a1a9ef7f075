"""Tiny decoders of every family that can think, with all that is peculiar to it."""

import torch
import transformers

VOCABULARY = 61

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.15,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_HEADS = {"head_dim": 16}
_GEMMA = _HEADS | {"query_pre_attn_scalar": 20, "sliding_window": 6, "final_logit_softcapping": 12.0}
_HALF_FULL = ["sliding_attention", "full_attention", "sliding_attention"]

# Class names without their ends, and what is added to the sizes; behind a colon which variant it is.
FAMILIES = {
    "Gemma": _HEADS,
    "Gemma2": _GEMMA | {"attn_logit_softcapping": 2.0},
    "Gemma3:Text": _GEMMA | {"layer_types": _HALF_FULL},
    "Glm": {"head_dim": 12},
    "Granite": {
        "embedding_multiplier": 2.0, "logits_scaling": 0.6, "residual_multiplier": 0.7, "attention_multiplier": 0.2,
    },
    "Llama": {},
    "Llama:tied": {"tie_word_embeddings": True},
    "Mistral": {},
    "Mistral:window": {"sliding_window": 5},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 5, "layer_types": _HALF_FULL},
    "Phi3": {},
    "Qwen2": {},
    "Qwen2:windows": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {"head_dim": 12},
    "Qwen3Moe": {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "SmolLM3": {"no_rope_layers": [1, 0, 1]},
    "Starcoder2": {"sliding_window": 5, "tie_word_embeddings": False},
}  # fmt: skip


def config_of(family: str, **fields) -> transformers.PreTrainedConfig:
    kind, _, variant = family.partition(":")
    name = f"{kind}TextConfig" if variant == "Text" else f"{kind}Config"
    return getattr(transformers, name)(**SIZES | FAMILIES[family] | fields)


def decoder_of(family: str, **fields) -> transformers.PreTrainedModel:
    """A model of the family with random weights, biases and norms too, and logits of a size of about 10."""
    config = config_of(family, **fields)
    # The attention that the family wrote down: until 5.15 that of the library left out Gemma 2's soft cap.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms begin at 1 or at 0 and biases at 0, where mistakes hide
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name == "lm_head.weight":
                parameter.mul_(2)
    return model
