"""All uses of transformers names that are private, were renamed, or differ between versions (5.15 to 5.24)."""

import inspect
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, sdpa_mask

__all__ = [
    "ASSISTANTS_WORK",
    "CACHE",
    "CACHE_NAMES",
    "GenerationHooks",
    "LeftByQuantisers",
    "UploadsOwnCard",
    "keep_own_fields",
    "only_cache",
    "pad_token_id",
    "register",
    "sdpa_attention_forward",
    "sdpa_mask",
]  # fmt: skip

# The name of the cache in arguments and outputs; the old name is accepted until 5.40.
CACHE_NAMES = ("past_key_values", "cache")
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# Before 5.18 rejected drafts stay in the cache of an assistant model, which fails some rounds later.
ASSISTANTS_WORK = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 18)


# A line of the empty card that transformers writes if a repository has none.
_TEMPLATE = "This model card has been automatically generated."


def only_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Return the cache, which may be given under either of its names.

    Raises:
        ValueError: it is given under both.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("cache must be None beside past_key_values, which is its old name, got both")
    return cache if past_key_values is None else past_key_values


def pad_token_id(generation_config: GenerationConfig) -> int | None:
    """Return the padding token that transformers prepared for a call of ``generate`` (by default the end of text)."""
    token: Tensor | None = generation_config._pad_token_tensor
    return None if token is None else int(token)


def keep_own_fields(generation_config: GenerationConfig) -> None:
    """Make loading keep our fields; transformers drops unknown ones that might come from a model's configuration."""
    generation_config._from_model_config = False


def register(config: type[PreTrainedConfig], model: type[PreTrainedModel]) -> None:
    """Register a causal language model with transformers, by its model type and by the class that its folders name."""
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)
    # ``transformers serve`` looks the class up in the package, which may exist as several module objects.
    setattr(type(transformers), model.__name__, model)


class GenerationHooks:
    """Mixin, listed before a transformers model, with the hooks of ``generate`` that a model may override.

    By default they do what transformers does.
    """

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        """Run the loop for greedy decoding and sampling."""
        return super()._sample(*args, **kwargs)

    def beam_search(self, *args: Any, **kwargs: Any) -> Any:
        """Run the loop for beam search."""
        return super()._beam_search(*args, **kwargs)

    def assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """Run the loop for assistant models and prompt lookup."""
        return super()._assisted_decoding(*args, **kwargs)

    def for_assistant(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return those arguments of ``forward`` that are passed on to an assistant model."""
        return arguments

    def on_new_cache(self, cache: Cache) -> None:
        """Receive the empty cache that ``generate`` creates if it was given none."""

    def _sample(self, *args, **kwargs):
        return self.sample(*args, **kwargs)

    def _beam_search(self, *args, **kwargs):
        return self.beam_search(*args, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        return self.assisted_decoding(*args, **kwargs)

    def _get_candidate_generator(self, *args, model_kwargs: dict, **kwargs):
        return super()._get_candidate_generator(*args, model_kwargs=self.for_assistant(model_kwargs), **kwargs)

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, model_kwargs: dict, *args):
        given = model_kwargs.get(CACHE)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if given is None and (made := model_kwargs.get(CACHE)) is not None:
            self.on_new_cache(made)


class UploadsOwnCard:
    """Mixin, listed before a transformers model, that uploads the model's own card if a repository has none yet."""

    def write_card(self, folder: str | PathLike, tags: list[str]) -> None:
        """Write ``README.md`` into a folder."""
        raise NotImplementedError

    def _upload_modified_files(self, working_dir: str | PathLike, *args, **kwargs):
        path = Path(working_dir) / "README.md"
        if path.is_file() and _TEMPLATE in (card := path.read_text(encoding="utf-8")):
            path.unlink()
            self.write_card(working_dir, ModelCard(card).data.tags or [])
        return super()._upload_modified_files(working_dir, *args, **kwargs)


class LeftByQuantisers:
    """Mixin, listed before a transformers model, that keeps quantisers from its heads, whose weights ops read."""

    _keep_in_fp32_modules = ["lm_head", "mixing_head", "gain_head"]

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Return the modules whose dtype differs from the model's: none. The list above is for quantisers only."""
        return {}
