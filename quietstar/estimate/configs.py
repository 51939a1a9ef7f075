"""Where the configuration of a model comes from: a name that is known offline, a file or folder, or the hub."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import MistralConfig

from quietstar.models import QuietStarConfig

# Sizes of known models, their two thought tokens included.
PRESETS: dict[str, dict[str, int]] = {
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
}

# Fields without which there is no model.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip


def read_config(name: str, **overrides: int) -> QuietStarConfig:
    """The configuration ``name`` with some fields replaced.

    Args:
        name: a preset, a JSON file or a folder with a config.json, or a name on the hub; of a Quiet-STaR model, or of
            an ordinary Mistral, which is given two more tokens.
        overrides: fields of ``QuietStarConfig``.

    Raises:
        ValueError: there is no such configuration, it is of another kind of model, or a field has a bad value.
    """
    fields = {**(PRESETS[name] if name in PRESETS else _saved_fields(name)), **overrides}
    try:
        config = QuietStarConfig(**fields)
    except StrictDataclassError as error:  # a field of another type
        raise ValueError(" ".join(str(error).split())) from error
    for size in SIZES:
        if getattr(config, size) < 1:
            raise ValueError(f"{size} must be an integer >= 1, got {getattr(config, size)}")
    return config


def _saved_fields(name: str) -> dict[str, object]:
    """Fields of a configuration that was saved, with thought tokens."""
    if not Path(name).exists() and (name.count("/") != 1 or name.endswith(".json")):
        raise ValueError(f"must be {', '.join(PRESETS)}, a folder, a JSON file or a name on the hub")
    try:
        fields, _ = QuietStarConfig.get_config_dict(name)
    except OSError as error:
        raise ValueError(f"cannot be read: {error}") from error
    if not fields or not isinstance(fields, dict):
        raise ValueError("holds no configuration")
    kind = fields.pop("model_type", None)
    thinks = kind == QuietStarConfig.model_type
    decoder = fields.get("text_config", {}).get("model_type", "mistral") if thinks else kind
    if decoder != "mistral":
        raise ValueError(f"must be of a Mistral or a Quiet-STaR model, got model type {decoder!r}")
    if not thinks:
        words = fields.get("vocab_size", MistralConfig.vocab_size)
        fields |= {"vocab_size": words + 2, "start_thought_token_id": words, "end_thought_token_id": words + 1}
    return fields
