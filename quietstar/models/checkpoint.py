"""Loading a model from an ordinary checkpoint, one of ours, or one in the layout of the authors' code."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

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
from quietstar.models.defaults import check_defaults
from quietstar.models.family_check import check_decoder, check_family
from quietstar.models.modeling import ThinkingModel

logger = logging.get_logger(__name__)

START_THOUGHT_TOKEN, END_THOUGHT_TOKEN = "<|startthought|>", "<|endthought|>"

# Arguments that say where a checkpoint is; they apply to its configuration, its tokenizer and its weights.
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_WHERE = (*_HUB, "gguf_file", "trust_remote_code")

# Tensors that Quiet-STaR adds to those of a decoder.
_ADDED = ("start_embedding.", "end_embedding.", "mixing_head.", "gain_head.")

# The only architecture that the authors trained and released; their code has switches for others.
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
    cls: type[ThinkingModel],
    name_or_path: str | PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    initial_token_ids: Iterable[int] | None = None,
    config: PreTrainedConfig | str | PathLike | None = None,
    **kwargs,
) -> ThinkingModel | tuple[ThinkingModel, dict]:
    """Create a Quiet-STaR model from an ordinary checkpoint of a decoder.

    Adds the two thought tokens to the vocabulary and initialises both thought embeddings with the embedding of "---".
    The mixing head and a gain head start at zero, so every prediction is the base model's until training changes it.
    With ``learned_thought_end`` the end token is initially as likely as "---".

    Args:
        name_or_path: folder or hub name of the checkpoint, of any family that can think.
        tokenizer: the checkpoint's tokenizer; the two thought tokens are added to it in place. Default: the tokenizer
            saved with the checkpoint, used only to look up "---".
        initial_token_ids: initialise the thought embeddings with the mean embedding of these tokens instead. No
            tokenizer is needed then.
        config: configuration of the decoder, or its folder or hub name. Default: the one saved with the checkpoint.
        kwargs: fields of ``QuietStarConfig`` and of the decoder's configuration set these fields; all others
            (``dtype``, ``device_map``, ``quantization_config``, ``output_loading_info``, ...) are passed to
            ``from_pretrained``. Arguments that say where the checkpoint is (``revision``, ``subfolder``, ``token``,
            ``cache_dir``, ...) also apply to its configuration and tokenizer.

    Raises:
        ValueError: the decoder cannot think (``UnsupportedFamilyError``; the message says why and lists those that
            can), or its predictions differ from the new model's on a few tokens; the checkpoint lacks tensors; the
            tokenizer belongs to another model, or there is none to look up "---".
    """
    where = _where(kwargs)
    if not isinstance(config, PreTrainedConfig):
        if config is None:
            _check_folder("name_or_path", name_or_path, where)
        config = AutoConfig.from_pretrained(name_or_path if config is None else config, **where)
    check_decoder("name_or_path", config)
    own, of_base = _pop_config_fields(kwargs, type(config))
    base = type(config).from_dict(config.to_dict() | of_base)
    start_token, end_token = base.vocab_size, base.vocab_size + 1
    if tokenizer is not None:
        _check_tokenizer(tokenizer, base.vocab_size)
        tokenizer.add_tokens([START_THOUGHT_TOKEN, END_THOUGHT_TOKEN], special_tokens=True)
        start_token, end_token = tokenizer.convert_tokens_to_ids([START_THOUGHT_TOKEN, END_THOUGHT_TOKEN])
    if initial_token_ids is None:
        initial_token_ids = _tokenizer_of(name_or_path, tokenizer, where).encode("---", add_special_tokens=False)
    initial_token_ids = list(initial_token_ids)
    if not initial_token_ids or not all(token in range(base.vocab_size) for token in initial_token_ids):
        raise ValueError(
            f"initial_token_ids must be one or more token ids in [0, {base.vocab_size}), got {initial_token_ids}"
        )

    thought_tokens = {"start_thought_token_id": start_token, "end_thought_token_id": end_token}
    is_folder = Path(name_or_path).is_dir()  # a relative path could be read as a hub name elsewhere
    name = str(Path(name_or_path).resolve() if is_folder else name_or_path)
    origin = {"base_model_name_or_path": name, "base_vocab_size": base.vocab_size}
    config = QuietStarConfig(text_config=base, **(origin | thought_tokens | own))
    with_info = kwargs.pop("output_loading_info", False)
    with _expected_warnings():
        model, info = _load(cls, name_or_path, config=config, **kwargs)
        _check_loaded("name_or_path", name_or_path, model, info, may_lack=_ADDED)
        model.resize_token_embeddings(max(base.vocab_size, start_token + 1, end_token + 1))
    _warn(name_or_path, info)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()
        tokens = torch.tensor(initial_token_ids, device=embeddings.weight.device)
        initial = embeddings(tokens).float().mean(dim=0) / config.embedding_scale
        model.start_embedding.weight.copy_(initial)
        model.end_embedding.weight.copy_(initial)
        if config.learned_thought_end:
            model.lm_head.weight[end_token] = model.lm_head.weight[tokens.to(model.lm_head.weight.device)].mean(dim=0)
    check_family("name_or_path", model)
    return (model, info) if with_info else model


def from_pretrained(
    cls: type[ThinkingModel],
    pretrained_model_name_or_path: str | PathLike | None,
    *args,
    config: QuietStarConfig | str | PathLike | None = None,
    **kwargs,
) -> ThinkingModel | tuple[ThinkingModel, dict]:
    """Load a Quiet-STaR checkpoint: one of ours, or one in the layout of the authors' code.

    Takes the arguments of every transformers model. Keyword arguments that are fields of ``QuietStarConfig`` override
    the saved values. Quantisation leaves ``lm_head`` and the mixing head unchanged. If ``gain_weight`` is given for a
    checkpoint without a gain head, the model gets one that starts at zero.

    Raises:
        ValueError: the checkpoint has neither layout (an ordinary checkpoint, for example) or lacks tensors, or the
            model cannot think with this ``quantization_config`` or ``device_map``.
    """
    path = pretrained_model_name_or_path
    with_info = kwargs.pop("output_loading_info", False)
    may_lack = ("gain_head.",) if kwargs.get("gain_weight") else ()
    if config is None and path is not None:
        path, config, kwargs = _resolve(path, kwargs)
    elif config is not None and not isinstance(config, PreTrainedConfig):
        config = QuietStarConfig.from_pretrained(config, **_where(kwargs))
    if config is not None and not isinstance(config, QuietStarConfig):
        raise TypeError(f"config must be a QuietStarConfig, got {type(config).__name__}")
    model, info = _load(cls, path, *args, config=config, **kwargs)
    _check_loaded("pretrained_model_name_or_path", pretrained_model_name_or_path, model, info, may_lack)
    check_defaults(model.generation_config)
    if path is None and pretrained_model_name_or_path is not None:
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
    return (model, info) if with_info else model


def _resolve(name_or_path: str | PathLike, kwargs: dict) -> tuple[str | PathLike | None, QuietStarConfig, dict]:
    """Determine the arguments with which transformers loads the weights of a Quiet-STaR checkpoint.

    Returns:
        The path, the configuration with the fields among ``kwargs`` overridden, and the rest of ``kwargs``. For the
        authors' layout the path is None and ``kwargs`` hold the converted ``state_dict``.

    Raises:
        ValueError: the checkpoint has neither our layout nor the authors'.
    """
    where = _where(kwargs)
    _check_folder("pretrained_model_name_or_path", name_or_path, where)
    saved, _ = QuietStarConfig.get_config_dict(name_or_path, **where)
    if saved.get("model_type") == QuietStarConfig.model_type:
        own, of_base = _pop_config_fields(kwargs, type(QuietStarConfig.from_dict(saved).text_config))
        if "text_config" in saved:
            of_base = {"text_config": saved["text_config"] | of_base}
        return name_or_path, QuietStarConfig.from_dict(saved | of_base | own), kwargs
    if "max_thoughts" in saved:
        own, of_base = _pop_config_fields(kwargs, MistralConfig)
        config = QuietStarConfig(**(_authors_config(saved) | of_base | own))
        return None, config, kwargs | {"state_dict": _authors_weights(name_or_path, where)}
    raise ValueError(
        "pretrained_model_name_or_path must be a Quiet-STaR checkpoint, ours or the authors', "
        f"got model type {saved.get('model_type')!r} in {name_or_path}; from_base starts from an ordinary model"
    )


def _load(cls: type[ThinkingModel], *args, **kwargs) -> tuple[ThinkingModel, dict]:
    """Call transformers' ``from_pretrained`` and return the model and the loading info about its tensors."""
    return PreTrainedModel.from_pretrained.__func__(cls, *args, output_loading_info=True, **kwargs)


def _check_loaded(
    argument: str, name: str | PathLike, model: ThinkingModel, info: dict, may_lack: tuple[str, ...] = ()
) -> None:
    """Check that only tensors named ``may_lack...`` are missing, and that ops can read the weights they need."""
    lacking = sorted(key for key in info["missing_keys"] if not key.startswith(may_lack))
    head = {key for key in model.state_dict() if key.startswith("mixing_head.")}
    if head and head <= set(lacking):
        raise ValueError(f"prediction must be 'thought' for {name}, which has no mixing_head, got 'mixed'")
    if lacking:
        raise ValueError(f"{argument} must hold every tensor of the model; {name} lacks {', '.join(lacking)}")
    read = ("lm_head", "mixing_head.0") if model.config.prediction == "mixed" else ("lm_head",)
    for layer_name in read:  # ops read the weights of these layers instead of calling them
        layer = model.get_submodule(layer_name)
        kinds = type(layer), type(getattr(layer, "weight", None))
        if getattr(model, "is_quantized", False) and kinds != (nn.Linear, nn.Parameter):
            kind = " of ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"quantization_config must leave {layer_name} as it is, got a {kind}")
        if layer.weight.is_meta:
            raise ValueError(f"device_map must keep {layer_name} on a device, got it offloaded")


def _warn(name_or_path: str | PathLike, info: dict) -> None:
    """Issue the warnings of transformers that ``_expected_warnings`` should not have suppressed."""
    if unexpected := sorted(info["unexpected_keys"]):
        logger.warning(f"{name_or_path} holds tensors that are not used: {', '.join(unexpected)}")
    if mismatched := sorted(key for key, *_ in info["mismatched_keys"]):
        logger.warning(f"{name_or_path} holds tensors of other shapes; random ones instead: {', '.join(mismatched)}")


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Silence transformers' warnings about tensors missing in a base checkpoint and about new vocabulary rows."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _where(kwargs: dict) -> dict:
    """Return those of ``kwargs`` that say where the checkpoint is."""
    return {name: kwargs[name] for name in _WHERE if name in kwargs}


def _check_folder(argument: str, name_or_path: str | PathLike, where: dict) -> None:
    """Require a folder to hold a configuration; the error message lists what it holds instead."""
    folder = Path(name_or_path) / (where.get("subfolder") or "")
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file() and not where.get("gguf_file"):
        raise ValueError(f"{argument} must hold a model: no {CONFIG_NAME} in {folder}, {contents(folder)}")


def contents(folder: Path, most: int = 8) -> str:
    """Describe, for an error message, what a folder that lacks something holds."""
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"only {', '.join(names[:most])}{more}" if names else "which is empty"


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: QuietStarConfig) -> None:
    """Check that a tokenizer fits a Quiet-STaR model: it has no more tokens than the model and the same thought tokens.

    Raises:
        ValueError: it belongs to another model.
    """
    vocabulary = tokenizer.get_vocab()
    if (most := max(vocabulary.values(), default=-1)) >= config.vocab_size:
        raise ValueError(
            f"tokenizer must be that of the model, whose vocabulary has {config.vocab_size} tokens, got one with token "
            f"{most}"
        )
    for text, token in zip((START_THOUGHT_TOKEN, END_THOUGHT_TOKEN), config.thought_token_ids, strict=True):
        if (found := vocabulary.get(text, token)) != token:
            raise ValueError(f"tokenizer must be that of the model, where {text} is token {token}, got token {found}")


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Require a tokenizer to have no more tokens, except added ones, than its model, which is often padded."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer must be that of the model, whose vocabulary has {vocab_size} tokens, got one with "
            f"{tokenizer.vocab_size}"
        )


def _tokenizer_of(
    name_or_path: str | PathLike, tokenizer: PreTrainedTokenizerBase | None, where: dict
) -> PreTrainedTokenizerBase:
    if tokenizer is not None:
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **where)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer or initial_token_ids must be given: no tokenizer in {name_or_path}") from error


def _pop_config_fields(kwargs: dict, base: type[PreTrainedConfig]) -> tuple[dict, dict]:
    """Remove from ``kwargs``, and return, the fields of our configuration and those of the ``base`` model's.

    ``dtype`` is left for loading, where it may be "auto".
    """
    own = QuietStarConfig.__dataclass_fields__.keys() - {"dtype", "text_config"}
    of_base = base.__dataclass_fields__.keys() - own - {"dtype"}
    return tuple({name: kwargs.pop(name) for name in list(kwargs) if name in names} for names in (own, of_base))


def _authors_config(saved: dict) -> dict:
    """Create our configuration from the authors' config.json.

    It holds only the sum max_thoughts = n_ahead + n_ahead_talk + 1 = thought_length + lookahead + 4. lookahead, which
    only training needs, is assumed to be 1, as in the released quietstar-8-ahead.
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
    """Load the authors' tensors under our names. Only row 0 of their thought embeddings [2, H] is used."""
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
    """Return the files that hold a checkpoint's tensors, downloaded if it is on the hub; empty if there are none."""
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
    """Convert a state dict (weights or gradients) from the authors' names and shapes to ours."""
    ours = {re.sub(r"^talk_head\.0\.", "mixing_head.", name): tensor for name, tensor in weights.items()}
    for name in ("start_embedding", "end_embedding"):
        ours[f"{name}.weight"] = ours.pop(name)[0]
    return ours
