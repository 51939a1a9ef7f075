"""Which decoders can think, and what keeps another from it."""

from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

# Model types that the tests hold to their own forward, thought by thought. Any other whose attention goes through
# transformers' AttentionInterface may think too: ``from_base`` compares it with itself first.
FAMILIES = (
    "gemma", "gemma2", "gemma3_text", "glm", "granite", "llama", "mistral", "mixtral", "olmo2", "olmo3", "phi3",
    "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
)  # fmt: skip

_LAYER_TYPES = {"full_attention", "sliding_attention"}

# Fields of a configuration that say, unless they are None, False or 0, that thoughts would be silently wrong, and why.
_REASONS = {
    "is_encoder_decoder": "an encoder-decoder reads its text otherwise than it writes",
    "is_heterogeneous": "layers have configurations of their own",
    "use_bidirectional_attention": "text sees what follows it",
    "attention_chunk_size": "attention is in chunks",
    "kv_lora_rank": "keys and values are latent (MLA)",
    "num_kv_shared_layers": "layers share keys and values",
    "logit_scale": "logits are multiplied",
    "output_router_logits": "the loss of the experts' router would be left out",
}


class UnsupportedFamilyError(ValueError):
    """A decoder that cannot think; the message says why, and which can."""

    def __init__(self, name: str, config: PreTrainedConfig, reason: str):
        super().__init__(
            f"{name} must be a decoder that can think, got model type {config.model_type!r}: {reason}. Tested are "
            f"{', '.join(FAMILIES)}"
        )


def unsupported(config: PreTrainedConfig) -> str | None:
    """Why a decoder of this configuration cannot think; None if nothing is known."""
    if config.model_type == "quietstar":
        return "it thinks already, and from_pretrained loads it"
    if config.get_text_config() is not config:
        return "it is made of several models"
    kind = MODEL_MAPPING.get(type(config), None)
    if kind is None:
        return "transformers has no decoder of it"
    if not isinstance(kind, type) or not kind._supports_attention_backend:
        return "its attention does not go through transformers' AttentionInterface"
    for name, reason in _REASONS.items():
        if value := getattr(config, name, None):
            return f"{reason} ({name} = {value})"
    if other := set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES:
        return f"it has layers of type {', '.join(sorted(other))}"
    return None


def new_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """The decoder of a configuration without a head, with random weights.

    Raises:
        UnsupportedFamilyError: it cannot think.
    """
    if (reason := unsupported(config)) is not None:
        raise UnsupportedFamilyError("text_config", config, reason)
    decoder = MODEL_MAPPING[type(config)](config)
    refuse_sinks("text_config", decoder)
    decoder.layers = _Layers(decoder.layers)
    return decoder


class _Layers(nn.ModuleList):
    """Layers of which a decoder takes the first so many, all of them, in every pass: that makes no new list here.

    It saves a twentieth of a pass of a small model.
    """

    def __getitem__(self, which: int | slice) -> nn.Module:
        return self if which == slice(None, len(self), None) else super().__getitem__(which)


def refuse_sinks(name: str, model: PreTrainedModel) -> None:
    """Attention to a learned key that is no token; ``name`` is of the argument that the model came from."""
    if sinks := [parameter for parameter, _ in model.named_parameters() if parameter.endswith("sinks")]:
        raise UnsupportedFamilyError(name, model.config, f"its attention has sinks ({sinks[0]})")


def positions_of_short_texts(config: PreTrainedConfig) -> int | None:
    """How many positions a text may have before rotary embeddings of all its tokens change; None: they never do."""
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(nested for nested in rope.values() if isinstance(nested, dict))):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            return parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    return None
