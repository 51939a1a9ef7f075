"""Where a model comes from: an ordinary checkpoint, one of ours, or one in the layout of the authors' code."""

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

# Arguments that say where a checkpoint is, for its configuration, its tokenizer and its weights alike.
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_WHERE = (*_HUB, "gguf_file", "trust_remote_code")

# What Quiet-STaR adds to the tensors of a decoder.
_ADDED = ("start_embedding.", "end_embedding.", "mixing_head.", "gain_head.")

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
    cls: type[ThinkingModel],
    name_or_path: str | PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    initial_token_ids: Iterable[int] | None = None,
    config: PreTrainedConfig | str | PathLike | None = None,
    **kwargs,
) -> ThinkingModel | tuple[ThinkingModel, dict]:
    """Start Quiet-STaR from the ordinary checkpoint of a decoder.

    Adds the two thought tokens to the vocabulary, starts both thought embeddings from the embedding of "---" and the
    mixing head from zero, so that every prediction is the base model's until training moves it. So does a gain head.
    With ``learned_thought_end`` the end token is at first as likely as "---".

    Args:
        name_or_path: folder or hub name of the checkpoint, of any family that can think.
        tokenizer: its tokenizer; the two thought tokens are added to it in place. Default: the one saved with the
            checkpoint, used only to look up "---".
        initial_token_ids: start the thought embeddings from these tokens (their mean) instead; then no
            tokenizer is needed.
        config: of the decoder, or where it is; default the one saved with the checkpoint.
        kwargs: fields of ``QuietStarConfig`` and of the decoder's go to the configuration, the rest (``dtype``,
            ``device_map``, ``quantization_config``, ``output_loading_info``, ...) to ``from_pretrained``. What says
            where the checkpoint is (``revision``, ``subfolder``, ``token``, ``cache_dir``, ...) holds for its
            configuration and tokenizer too.

    Raises:
        ValueError: a decoder that cannot think, which the message says why and names those that can
            (``UnsupportedFamilyError``), or whose own predictions differ from those of
            the new model on a few tokens; a checkpoint that lacks tensors; a tokenizer of another model, or none to
            look up "---".
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
    is_folder = Path(name_or_path).is_dir()  # whose relative name might elsewhere be one of the hub's
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

    Arguments as for every transformers model; keyword arguments that are fields of ``QuietStarConfig`` override
    the saved ones. Quantisers leave ``lm_head`` and the mixing head alone. A ``gain_weight`` given to a checkpoint that
    has no gain head yet starts one from zero.

    Raises:
        ValueError: a checkpoint that is neither (an ordinary one, for example), or lacks tensors; a
            ``quantization_config`` or ``device_map`` under which the model cannot think.
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
    """``from_pretrained`` of transformers, and what it tells of the tensors."""
    return PreTrainedModel.from_pretrained.__func__(cls, *args, output_loading_info=True, **kwargs)


def _check_loaded(
    argument: str, name: str | PathLike, model: ThinkingModel, info: dict, may_lack: tuple[str, ...] = ()
) -> None:
    """Every tensor is there but those whose names begin with ``may_lack``, and ops can read what they read."""
    lacking = sorted(key for key in info["missing_keys"] if not key.startswith(may_lack))
    head = {key for key in model.state_dict() if key.startswith("mixing_head.")}
    if head and head <= set(lacking):
        raise ValueError(f"prediction must be 'thought' for {name}, which has no mixing_head, got 'mixed'")
    if lacking:
        raise ValueError(f"{argument} must hold every tensor of the model; {name} lacks {', '.join(lacking)}")
    read = ("lm_head", "mixing_head.0") if model.config.prediction == "mixed" else ("lm_head",)
    for layer_name in read:  # their weights are read, not the layers called
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


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: QuietStarConfig) -> None:
    """Whether a tokenizer may be that of a Quiet-STaR model: it knows fewer tokens, or as many, and the same thoughts.

    Raises:
        ValueError: it is another model's.
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
    """A tokenizer may know fewer tokens than its model, which are often padded, but no more, save those added to it."""
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
    """Take the fields of the configuration out of ``kwargs``, and those of the ``base`` model's.

    ``dtype`` is for loading, where it may be "auto".
    """
    own = QuietStarConfig.__dataclass_fields__.keys() - {"dtype", "text_config"}
    of_base = base.__dataclass_fields__.keys() - own - {"dtype"}
    return tuple({name: kwargs.pop(name) for name in list(kwargs) if name in names} for names in (own, of_base))


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
