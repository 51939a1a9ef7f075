"""Where a model comes from: an ordinary Mistral checkpoint, one of ours, or one in the layout of the authors' code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, MistralConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from quietstar.models.configuration import QuietStarConfig

if TYPE_CHECKING:
    from quietstar.models.modeling import QuietStarForCausalLM

START_THOUGHT_TOKEN, END_THOUGHT_TOKEN = "<|startthought|>", "<|endthought|>"

# The one architecture the authors trained and released; their code has switches for others.
_AUTHORS_SWITCHES = {
    "merged_talk_heads": True,
    "merged_lm_and_talk_heads": False,
    "merged_lm_and_think_heads": True,
    "use_concat_talk_head": True,
    "use_shallow_talk": False,
    "use_complex_talk_head": True,
    "use_weighted_talk_head": True,
}


def from_base(
    cls: type[QuietStarForCausalLM],
    name_or_path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    initial_token_ids: Iterable[int] | None = None,
    **kwargs,
) -> QuietStarForCausalLM:
    """Start Quiet-STaR from an ordinary Mistral checkpoint.

    Adds the two thought tokens to the vocabulary, starts both thought embeddings from the embedding of "---" and the
    mixing head from zero, so that every prediction is the base model's until training moves it.

    Args:
        name_or_path: folder or hub name of a Mistral checkpoint.
        tokenizer: its tokenizer; the two thought tokens are added to it in place. Default: the one saved with the
            checkpoint, used only to look up "---".
        initial_token_ids: start the thought embeddings from the mean embedding of these tokens instead; then no
            tokenizer is needed.
        kwargs: fields of :class:`QuietStarConfig` go to the configuration, the rest to ``from_pretrained``.

    Raises:
        ValueError: not a Mistral checkpoint, or no tokenizer to look up "---".
    """
    base = AutoConfig.from_pretrained(name_or_path)
    if type(base) is not MistralConfig:
        raise ValueError(f"name_or_path must be a Mistral checkpoint, got model type {base.model_type!r}")
    start_token, end_token = base.vocab_size, base.vocab_size + 1
    if tokenizer is not None:
        tokenizer.add_tokens([START_THOUGHT_TOKEN, END_THOUGHT_TOKEN], special_tokens=True)
        start_token, end_token = tokenizer.convert_tokens_to_ids([START_THOUGHT_TOKEN, END_THOUGHT_TOKEN])
    if initial_token_ids is None:
        initial_token_ids = _tokenizer_of(name_or_path, tokenizer).encode("---", add_special_tokens=False)

    config = QuietStarConfig(
        **{name: value for name, value in base.to_dict().items() if name not in ("model_type", "architectures")},
        start_thought_token_id=start_token,
        end_thought_token_id=end_token,
        **_pop_config_fields(kwargs),
    )
    with _expected_warnings():
        model = cls.from_pretrained(name_or_path, config=config, **kwargs)
        model.resize_token_embeddings(max(base.vocab_size, start_token + 1, end_token + 1))
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        initial = embeddings[list(initial_token_ids)].float().mean(dim=0) / config.embedding_scale
        model.start_embedding.weight.copy_(initial)
        model.end_embedding.weight.copy_(initial)
    return model


def resolve(name_or_path: str | Path, **kwargs) -> tuple[QuietStarConfig, dict]:
    """The configuration of a Quiet-STaR checkpoint and the arguments with which transformers loads its weights.

    Returns:
        The configuration, with the fields among ``kwargs`` overridden, and the rest of ``kwargs`` together with
        ``pretrained_model_name_or_path`` and, for the authors' layout, the converted ``state_dict``.

    Raises:
        ValueError: neither our layout nor the authors'.
    """
    if Path(name_or_path).is_dir() and not (Path(name_or_path) / "config.json").is_file():
        raise ValueError(f"pretrained_model_name_or_path must hold a model: no config.json in {name_or_path}")
    saved, _ = QuietStarConfig.get_config_dict(name_or_path)
    fields = _pop_config_fields(kwargs)
    if saved.get("model_type") == QuietStarConfig.model_type:
        config = QuietStarConfig.from_dict(saved | fields)  # checked, unlike from_pretrained(..., **fields)
        return config, kwargs | {"pretrained_model_name_or_path": name_or_path}
    if "max_thoughts" in saved:
        config = QuietStarConfig(**(_authors_config(saved) | fields))
        return config, kwargs | {"pretrained_model_name_or_path": None, "state_dict": _authors_weights(name_or_path)}
    raise ValueError(
        "pretrained_model_name_or_path must be a Quiet-STaR checkpoint, ours or the authors', "
        f"got model type {saved.get('model_type')!r} in {name_or_path}; from_base starts from an ordinary Mistral"
    )


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Transformers reports the tensors that a base checkpoint lacks and the new rows of the vocabulary: both wanted."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _tokenizer_of(name_or_path: str | Path, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is not None:
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer or initial_token_ids must be given: no tokenizer in {name_or_path}") from error


def _pop_config_fields(kwargs: dict) -> dict:
    """Take the fields of the configuration out of ``kwargs``."""
    fields = QuietStarConfig.__dataclass_fields__
    return {name: kwargs.pop(name) for name in list(kwargs) if name in fields}


def _authors_config(saved: dict) -> dict:
    """Our configuration from the authors' config.json.

    It holds max_thoughts = n_ahead + n_ahead_talk + 1 = thought_length + lookahead + 4 and not the parts; lookahead is
    taken to be 1, as in the released quietstar-8-ahead (only training needs it).
    """
    for name, supported in _AUTHORS_SWITCHES.items():
        if saved.get(name, supported) != supported:
            raise ValueError(f"{name} must be {supported} in an authors' checkpoint, got {saved[name]}")
    ours = {
        name: value
        for name, value in saved.items()
        if name not in _AUTHORS_SWITCHES and name not in ("model_type", "architectures", "auto_map", "max_thoughts")
    }
    return ours | {
        "lookahead": 1,
        "thought_length": saved["max_thoughts"] - 5,
        "start_thought_token_id": saved["vocab_size"] - 2,
        "end_thought_token_id": saved["vocab_size"] - 1,
    }


def _authors_weights(name_or_path: str | Path) -> dict[str, Tensor]:
    """The authors' tensors under our names. Of the thought embeddings [2, H] only row 0 is used."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=["*.safetensors", "*.json"]))
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    if "start_embedding" not in weights:
        raise ValueError(f"pretrained_model_name_or_path must hold the authors' tensors, got none in {folder}")
    return authors_state_dict(weights)


def authors_state_dict(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the authors' names and shapes (weights or gradients) in ours."""
    ours = {re.sub(r"^talk_head\.0\.", "mixing_head.", name): tensor for name, tensor in weights.items()}
    for name in ("start_embedding", "end_embedding"):
        ours[f"{name}.weight"] = ours.pop(name)[0]
    return ours
