"""Where a model comes from: an ordinary Mistral checkpoint, one of ours, or one in the layout of the authors' code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

from quietstar.models.configuration import QuietStarConfig

if TYPE_CHECKING:
    from quietstar.models.modeling import QuietStarForCausalLM

logger = logging.get_logger(__name__)

START_THOUGHT_TOKEN, END_THOUGHT_TOKEN = "<|startthought|>", "<|endthought|>"

# Arguments that say where a checkpoint is, for its configuration, its tokenizer and its weights alike.
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_WHERE = (*_HUB, "gguf_file", "trust_remote_code")

# What Quiet-STaR adds to the tensors of a Mistral.
_ADDED = ("start_embedding.", "end_embedding.", "mixing_head.")

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
    name_or_path: str | PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    initial_token_ids: Iterable[int] | None = None,
    config: MistralConfig | str | PathLike | None = None,
    **kwargs,
) -> QuietStarForCausalLM | tuple[QuietStarForCausalLM, dict]:
    """Start Quiet-STaR from an ordinary Mistral checkpoint.

    Adds the two thought tokens to the vocabulary, starts both thought embeddings from the embedding of "---" and the
    mixing head from zero, so that every prediction is the base model's until training moves it.

    Args:
        name_or_path: folder or hub name of a Mistral checkpoint.
        tokenizer: its tokenizer; the two thought tokens are added to it in place. Default: the one saved with the
            checkpoint, used only to look up "---".
        initial_token_ids: start the thought embeddings from the mean embedding of these tokens instead; then no
            tokenizer is needed.
        config: of the Mistral, or where it is; default the one saved with the checkpoint.
        kwargs: fields of :class:`QuietStarConfig` go to the configuration, the rest (``dtype``, ``device_map``,
            ``quantization_config``, ``output_loading_info``, ...) to ``from_pretrained``. What says where the
            checkpoint is (``revision``, ``subfolder``, ``token``, ``cache_dir``, ...) holds for its configuration and
            tokenizer too.

    Raises:
        ValueError: not a Mistral checkpoint, one that lacks tensors, or no tokenizer to look up "---".
    """
    where = _where(kwargs)
    if not isinstance(config, PreTrainedConfig):
        if config is None:
            _check_folder("name_or_path", name_or_path, where)
        config = AutoConfig.from_pretrained(name_or_path if config is None else config, **where)
    base = config
    if type(base) is not MistralConfig:
        raise ValueError(f"name_or_path must be a Mistral checkpoint, got model type {base.model_type!r}")
    start_token, end_token = base.vocab_size, base.vocab_size + 1
    if tokenizer is not None:
        tokenizer.add_tokens([START_THOUGHT_TOKEN, END_THOUGHT_TOKEN], special_tokens=True)
        start_token, end_token = tokenizer.convert_tokens_to_ids([START_THOUGHT_TOKEN, END_THOUGHT_TOKEN])
    if initial_token_ids is None:
        initial_token_ids = _tokenizer_of(name_or_path, tokenizer, where).encode("---", add_special_tokens=False)
    initial_token_ids = list(initial_token_ids)
    if not initial_token_ids or not all(token in range(base.vocab_size) for token in initial_token_ids):
        raise ValueError(
            f"initial_token_ids must be one or more token ids in [0, {base.vocab_size}), got {initial_token_ids}"
        )

    config = QuietStarConfig(
        **{
            **{name: value for name, value in base.to_dict().items() if name not in ("model_type", "architectures")},
            "start_thought_token_id": start_token,
            "end_thought_token_id": end_token,
            **_pop_config_fields(kwargs),
        }
    )
    with_info = kwargs.pop("output_loading_info", False)
    with _expected_warnings():
        model, info = _load(cls, name_or_path, config=config, **kwargs)
        _check_loaded("name_or_path", name_or_path, model, info, may_lack=_ADDED)
        model.resize_token_embeddings(max(base.vocab_size, start_token + 1, end_token + 1))
    _warn(name_or_path, info)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        initial = embeddings[initial_token_ids].float().mean(dim=0) / config.embedding_scale
        model.start_embedding.weight.copy_(initial)
        model.end_embedding.weight.copy_(initial)
    return (model, info) if with_info else model


def from_pretrained(
    cls: type[QuietStarForCausalLM],
    pretrained_model_name_or_path: str | PathLike | None,
    *args,
    config: QuietStarConfig | str | PathLike | None = None,
    **kwargs,
) -> QuietStarForCausalLM | tuple[QuietStarForCausalLM, dict]:
    """Load a Quiet-STaR checkpoint: one of ours, or one in the layout of the authors' code.

    Arguments as for every transformers model; keyword arguments that are fields of :class:`QuietStarConfig` override
    the saved ones. Quantisers leave ``lm_head`` and the mixing head alone.

    Raises:
        ValueError: a checkpoint that is neither (an ordinary Mistral checkpoint, for example), or lacks tensors; a
            ``quantization_config`` or ``device_map`` under which the model cannot think.
    """
    path = pretrained_model_name_or_path
    with_info = kwargs.pop("output_loading_info", False)
    if config is None and path is not None:
        path, config, kwargs = _resolve(path, kwargs)
    elif config is not None and not isinstance(config, PreTrainedConfig):
        config = QuietStarConfig.from_pretrained(config, **_where(kwargs))
    if config is not None and not isinstance(config, QuietStarConfig):
        raise TypeError(f"config must be a QuietStarConfig, got {type(config).__name__}")
    model, info = _load(cls, path, *args, config=config, **kwargs)
    _check_loaded("pretrained_model_name_or_path", pretrained_model_name_or_path, model, info)
    if path is None and pretrained_model_name_or_path is not None:
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
    return (model, info) if with_info else model


def _resolve(name_or_path: str | PathLike, kwargs: dict) -> tuple[str | PathLike | None, QuietStarConfig, dict]:
    """With which arguments transformers loads the weights of a Quiet-STaR checkpoint.

    Returns:
        The path, the configuration with the fields among ``kwargs`` overridden, and the rest of ``kwargs``. For the
        authors' layout the path is None and ``kwargs`` hold the converted ``state_dict``.

    Raises:
        ValueError: neither our layout nor the authors'.
    """
    where = _where(kwargs)
    _check_folder("pretrained_model_name_or_path", name_or_path, where)
    saved, _ = QuietStarConfig.get_config_dict(name_or_path, **where)
    fields = _pop_config_fields(kwargs)
    if saved.get("model_type") == QuietStarConfig.model_type:
        return name_or_path, QuietStarConfig.from_dict(saved | fields), kwargs
    if "max_thoughts" in saved:
        config = QuietStarConfig(**(_authors_config(saved) | fields))
        return None, config, kwargs | {"state_dict": _authors_weights(name_or_path, where)}
    raise ValueError(
        "pretrained_model_name_or_path must be a Quiet-STaR checkpoint, ours or the authors', "
        f"got model type {saved.get('model_type')!r} in {name_or_path}; from_base starts from an ordinary Mistral"
    )


def _load(cls: type[QuietStarForCausalLM], *args, **kwargs) -> tuple[QuietStarForCausalLM, dict]:
    """``from_pretrained`` of transformers, and what it tells of the tensors."""
    return PreTrainedModel.from_pretrained.__func__(cls, *args, output_loading_info=True, **kwargs)


def _check_loaded(
    argument: str, name: str | PathLike, model: QuietStarForCausalLM, info: dict, may_lack: tuple[str, ...] = ()
) -> None:
    """Every tensor is there but those whose names begin with ``may_lack``, and ops can read what they read."""
    lacking = sorted(key for key in info["missing_keys"] if not key.startswith(may_lack))
    if lacking:
        raise ValueError(f"{argument} must hold every tensor of the model; {name} lacks {', '.join(lacking)}")
    for layer_name in ("lm_head", "mixing_head.0"):  # their weights are read, not the layers called
        layer = model.get_submodule(layer_name)
        kinds = type(layer), type(getattr(layer, "weight", None))
        if getattr(model, "is_quantized", False) and kinds != (nn.Linear, nn.Parameter):
            kind = " of ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"quantization_config must leave {layer_name} as it is, got a {kind}")
        if layer.weight.is_meta:
            raise ValueError(f"device_map must keep {layer_name} on a device, got it offloaded")


def _warn(name_or_path: str | PathLike, info: dict) -> None:
    """Of what transformers would have warned of, had it not been told to be silent."""
    if unexpected := sorted(info["unexpected_keys"]):
        logger.warning(f"{name_or_path} holds tensors that are not used: {', '.join(unexpected)}")
    if mismatched := sorted(key for key, *_ in info["mismatched_keys"]):
        logger.warning(f"{name_or_path} holds tensors of other shapes; random ones instead: {', '.join(mismatched)}")


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Transformers reports the tensors that a base checkpoint lacks and the new rows of the vocabulary: both wanted."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _where(kwargs: dict) -> dict:
    """Those of ``kwargs`` that say where the checkpoint is."""
    return {name: kwargs[name] for name in _WHERE if name in kwargs}


def _check_folder(argument: str, name_or_path: str | PathLike, where: dict) -> None:
    """A folder must have a configuration; what has none says what it holds instead."""
    folder = Path(name_or_path) / (where.get("subfolder") or "")
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file() and not where.get("gguf_file"):
        raise ValueError(f"{argument} must hold a model: no {CONFIG_NAME} in {folder}, {contents(folder)}")


def contents(folder: Path, most: int = 8) -> str:
    """What a folder that lacks something holds, in words."""
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"only {', '.join(names[:most])}{more}" if names else "which is empty"


def _tokenizer_of(
    name_or_path: str | PathLike, tokenizer: PreTrainedTokenizerBase | None, where: dict
) -> PreTrainedTokenizerBase:
    if tokenizer is not None:
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **where)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer or initial_token_ids must be given: no tokenizer in {name_or_path}") from error


def _pop_config_fields(kwargs: dict) -> dict:
    """Take the fields of the configuration out of ``kwargs``; ``dtype`` is for loading, where it may be "auto"."""
    fields = QuietStarConfig.__dataclass_fields__.keys() - {"dtype"}
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


def _authors_weights(name_or_path: str | PathLike, where: dict) -> dict[str, Tensor]:
    """The authors' tensors under our names. Of the thought embeddings [2, H] only row 0 is used."""
    weights = {}
    for file in _weight_files(name_or_path, {name: value for name, value in where.items() if name in _HUB}):
        if file.endswith(".safetensors"):
            weights |= load_file(file)
        else:
            weights |= torch.load(file, map_location="cpu", weights_only=True)
    if "start_embedding" not in weights:
        raise ValueError(f"pretrained_model_name_or_path must hold the authors' tensors, got none in {name_or_path}")
    return authors_state_dict(weights)


def _weight_files(name_or_path: str | PathLike, where: dict) -> list[str]:
    """The files of a checkpoint's tensors, fetched where it is on the hub; none where it has none."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        try:
            file = cached_file(name_or_path, name, **where)
        except OSError:
            continue
        if name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
            return get_checkpoint_shard_files(name_or_path, file, **where)[0]
        return [file]
    return []


def authors_state_dict(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the authors' names and shapes (weights or gradients) in ours."""
    ours = {re.sub(r"^talk_head\.0\.", "mixing_head.", name): tensor for name, tensor in weights.items()}
    for name in ("start_embedding", "end_embedding"):
        ours[f"{name}.weight"] = ours.pop(name)[0]
    return ours
