"""Which decoders can think, and why others cannot."""

from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

# Model types that the tests compare with their own forward, thought by thought. Any other type whose attention goes
# through transformers' AttentionInterface may work too: ``from_base`` first compares it with its own predictions.
FAMILIES = (
    "gemma", "gemma2", "gemma3_text", "glm", "granite", "llama", "mistral", "mixtral", "olmo2", "olmo3", "phi3",
    "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
)  # fmt: skip

_LAYER_TYPES = {"full_attention", "sliding_attention"}

# Configuration fields which, unless None, False or 0, mean that thoughts would be silently wrong, and the reason.
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
    """Raised for a decoder that cannot think; the message says why, and lists those that can."""

    def __init__(self, name: str, config: PreTrainedConfig, reason: str):
        super().__init__(
            f"{name} must be a decoder that can think, got model type {config.model_type!r}: {reason}. Tested are "
            f"{', '.join(FAMILIES)}"
        )


def unsupported(config: PreTrainedConfig) -> str | None:
    """Return why a decoder with this configuration cannot think; None if no reason is known."""
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
    """Create the decoder of a configuration, without a head and with random weights.

    Raises:
        UnsupportedFamilyError: the decoder cannot think.
    """
    if (reason := unsupported(config)) is not None:
        raise UnsupportedFamilyError("text_config", config, reason)
    decoder = MODEL_MAPPING[type(config)](config)
    refuse_sinks("text_config", decoder)
    decoder.layers = _Layers(decoder.layers)
    return decoder


class _Layers(nn.ModuleList):
    """A list of layers whose full slice, which a decoder takes in every pass, is the list itself instead of a copy.

    This saves a twentieth of a small model's pass.
    """

    def __getitem__(self, which: int | slice) -> nn.Module:
        return self if which == slice(None, len(self), None) else super().__getitem__(which)


def refuse_sinks(name: str, model: PreTrainedModel) -> None:
    """Refuse attention sinks (learned keys that are not tokens); ``name`` is the argument that named the model."""
    if sinks := [parameter for parameter, _ in model.named_parameters() if parameter.endswith("sinks")]:
        raise UnsupportedFamilyError(name, model.config, f"its attention has sinks ({sinks[0]})")


def positions_of_short_texts(config: PreTrainedConfig) -> int | None:
    """Return how long a text may be before the rotary embeddings of all its tokens change; None if they never do."""
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(nested for nested in rope.values() if isinstance(nested, dict))):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            return parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    return None
