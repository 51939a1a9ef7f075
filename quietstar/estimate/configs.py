"""Where the configuration of a model comes from: a name that is known offline, a file or folder, or the hub."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from quietstar.models import QuietStarConfig
from quietstar.models.families import FAMILIES, UnsupportedFamilyError, unsupported

# Sizes of known models, their two thought tokens included.
PRESETS: dict[str, dict[str, object]] = {
    "mistral-7b": {  # mistralai/Mistral-7B-v0.1
        "vocab_size": 32002,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "start_thought_token_id": 32000,
        "end_thought_token_id": 32001,
    },
    "llama-3.1-8b": {  # meta-llama/Llama-3.1-8B
        "text_config": {
            "model_type": "llama",
            "vocab_size": 128258,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
        "start_thought_token_id": 128256,
        "end_thought_token_id": 128257,
    },
    "qwen3-1.7b": {  # Qwen/Qwen3-1.7B-Base, which has rows for tokens to come
        "text_config": {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
        "start_thought_token_id": 151669,
        "end_thought_token_id": 151670,
    },
}

# Fields without which there is no model.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip


def read_config(name: str, **overrides: object) -> QuietStarConfig:
    """The configuration ``name`` with some fields replaced.

    Args:
        name: a preset, a JSON file or a folder with a config.json, or a name on the hub; of a Quiet-STaR model, or of
            an ordinary decoder, which is given two more tokens.
        overrides: fields of ``QuietStarConfig``.

    Raises:
        ValueError: there is no such configuration, a field has a bad value, or the decoder cannot think
            (``UnsupportedFamilyError``).
    """
    try:
        fields = PRESETS[name] if name in PRESETS else _saved_fields(name)
        config = QuietStarConfig(**{**fields, **overrides})
    except StrictDataclassError as error:  # a field of another type
        raise ValueError(" ".join(str(error).split())) from error
    if (reason := unsupported(config.text_config)) is not None:
        raise UnsupportedFamilyError("it", config.text_config, reason)
    return config


def _saved_fields(name: str) -> dict[str, object]:
    """Fields of a configuration that was saved, with thought tokens."""
    if not Path(name).exists() and (name.count("/") != 1 or name.endswith(".json")):
        raise ValueError(f"must be {', '.join(PRESETS)}, a folder, a JSON file or a name on the hub")
    try:
        fields, _ = QuietStarConfig.get_config_dict(name)
    except OSError as error:
        raise ValueError(f"cannot be read: {error}") from error
    except TypeError as error:  # some versions of transformers raise it if this is no dictionary
        raise ValueError("holds no configuration") from error
    if not fields or not isinstance(fields, dict):
        raise ValueError("holds no configuration")
    kind = fields.pop("model_type", None)
    thinks = kind == QuietStarConfig.model_type
    decoder = fields.get("text_config", {"model_type": "mistral"} | fields) if thinks else {"model_type": kind} | fields
    family = decoder.get("model_type") if isinstance(decoder, dict) else decoder
    if family not in FAMILIES:
        raise ValueError(
            f"must be of a Quiet-STaR model or of a decoder that can think, {', '.join(FAMILIES)}, got model type "
            f"{family!r}"
        )
    for size in SIZES:
        if isinstance(value := decoder.get(size), int) and value < 1:
            raise ValueError(f"{size} must be an integer >= 1, got {value}")
    if thinks:
        return fields
    text = CONFIG_MAPPING[family].from_dict(decoder)
    words = text.vocab_size
    text.vocab_size = words + 2
    return {"text_config": text, "start_thought_token_id": words, "end_thought_token_id": words + 1}
