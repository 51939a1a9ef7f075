"""Export of the base model alone, as a plain checkpoint of its family, for programs that do not support thoughts."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from quietstar.models.checkpoint import END_THOUGHT_TOKEN, START_THOUGHT_TOKEN, contents
from quietstar.models.configuration import QuietStarConfig
from quietstar.models.defaults import CHECKS
from quietstar.models.family_check import family_of
from quietstar.models.modeling import ThinkingModel

_THOUGHT_TOKENS = {START_THOUGHT_TOKEN, END_THOUGHT_TOKEN}

_CARD = """\
---
{metadata}
---

# The base model of {name}

A plain model of type `{family}`, written by `quietstar export`: it predicts what {name} predicts with `think="never"`.
It has no thoughts, and so neither the two thought tokens nor the mixing head nor what thoughts gain.
"""


def export_base(model: ThinkingModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | PathLike) -> int:
    """Write the model without thoughts, for ``AutoModelForCausalLM`` and other engines, and its tokenizer.

    Its logits are those of the base prediction. The thought tokens are removed from both vocabularies if they are the
    last tokens; otherwise they stay but are never generated.

    Args:
        model: a ``QuietStarForCausalLM``. It cannot be used afterwards, since its parts are moved and cut.
        tokenizer: the model's tokenizer; None if it has none.
        folder: a new or empty folder.

    Returns:
        The number of tokens of the base model.

    Raises:
        ValueError: the folder is not empty, or the model is quantised.
    """
    folder = check_new("folder", folder)
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "model must not be quantised: other engines read other formats, which they quantise themselves"
        )
    name, thoughts = model.name_or_path, model.config.thought_token_ids
    size = base_vocab_size(model.config, tokenizer)
    base = family_of(model)
    base.resize_token_embeddings(size)
    base.generation_config = _generation_config(model, [token for token in thoughts if token < size])
    if hasattr(base.config, "auto_map"):  # it names files of the original checkpoint
        del base.config.auto_map
    base.save_pretrained(folder)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)
    _write_card(base, name, folder)
    return size


def check_new(name: str, folder: str | PathLike) -> Path:
    """Check that an output folder, called ``name`` in the message, is new or empty.

    Raises:
        ValueError: it exists and is not empty.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        found = f"which holds {contents(path).removeprefix('only ')}" if path.is_dir() else "a file"
        raise ValueError(f"{name} must be a new or an empty folder, got {path}, {found}")
    return path


def base_vocab_size(config: QuietStarConfig, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return the base model's number of tokens: the recorded one, but no fewer than the tokenizer's ordinary tokens."""
    thoughts = config.thought_token_ids
    size = config.base_vocab_size
    if size is None:  # a folder of version 0.1, or in the authors' layout
        size = config.vocab_size
        while size - 1 in thoughts:
            size -= 1
    known = {} if tokenizer is None else tokenizer.get_vocab()
    others = max((token for token in known.values() if token not in thoughts), default=-1) + 1
    return min(max(size, others), config.vocab_size)


def _generation_config(model: ThinkingModel, thought_tokens: list[int]) -> GenerationConfig:
    """Return the model's generation config without our fields; remaining thought tokens are never generated."""
    saved = {name: value for name, value in model.generation_config.to_dict().items() if name not in CHECKS}
    if thought_tokens:
        saved["suppress_tokens"] = sorted({*(saved.get("suppress_tokens") or ()), *thought_tokens})
    return GenerationConfig.from_dict(saved)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer without the thought tokens if they are its last tokens; else other tokens' ids would change.

    Tokenizers have no method that removes tokens, so their JSON files are edited.
    """
    vocabulary = tokenizer.get_vocab()
    rest = {text: token for text, token in vocabulary.items() if text not in _THOUGHT_TOKENS}
    before = set(folder.iterdir())
    tokenizer.save_pretrained(folder)
    if len(rest) == len(vocabulary) or max(rest.values()) > min(vocabulary[text] for text in vocabulary.keys() - rest):
        return
    for file in set(folder.glob("*.json")) - before:
        content = _without(json.loads(file.read_text(encoding="utf-8")), _THOUGHT_TOKENS)
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    if AutoTokenizer.from_pretrained(folder).get_vocab() != rest:
        raise ValueError(
            f"tokenizer must be one that thought tokens can be removed from, got {type(tokenizer).__name__}"
        )


def _without(content: Any, tokens: set[str]) -> Any:
    """Remove the entries of some tokens from JSON data: keys or strings, or objects with this ``content``."""

    def kept(value: Any) -> bool:
        text = value.get("content") if isinstance(value, dict) else value
        return not (isinstance(text, str) and text in tokens)

    if isinstance(content, dict):
        return {key: _without(value, tokens) for key, value in content.items() if key not in tokens and kept(value)}
    if isinstance(content, list):
        return [_without(value, tokens) for value in content if kept(value)]
    return content


def _write_card(base: PreTrainedModel, name: str, folder: Path) -> None:
    metadata = ModelCardData(library_name="transformers", pipeline_tag="text-generation")
    card = _CARD.format(metadata=metadata.to_yaml(), name=f"`{name}`", family=base.config.model_type)
    (folder / "README.md").write_text(card, encoding="utf-8")
