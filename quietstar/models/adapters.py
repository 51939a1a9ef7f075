"""Folders that hold a PEFT adapter for a Quiet-STaR model instead of a model."""

from os import PathLike
from pathlib import Path

from transformers.utils import CONFIG_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from quietstar._packages import require
from quietstar.models.generation import QuietStarForCausalLM

BASE_FOLDER = "base_model"  # subfolder next to an adapter in which ``quietstar train`` saves its base model


def is_adapter(name_or_path: str | PathLike) -> bool:
    """Whether a folder or a repository on the hub holds an adapter and no model."""
    if (Path(name_or_path) / CONFIG_NAME).is_file():
        return False
    try:
        return find_adapter_config_file(str(name_or_path)) is not None
    except (OSError, ValueError):  # no such thing
        return False


def load_merged(name_or_path: str | PathLike, **kwargs) -> QuietStarForCausalLM:
    """Load an adapter's base model and merge the adapter into its weights.

    Args:
        name_or_path: folder or hub name of the adapter.
        kwargs: arguments of ``QuietStarForCausalLM.from_pretrained`` for the base model.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: there is no Quiet-STaR model at the place that the adapter names, nor next to the adapter; or the
            adapter is of a kind that cannot be merged.
    """
    peft = require("peft", f"the adapter in {name_or_path}", "peft")
    config = peft.PeftConfig.from_pretrained(str(name_or_path))
    if config.is_prompt_learning:
        raise ValueError(f"an adapter must be one that merges into weights, such as LoRA, got {config.peft_type.value}")
    base = _base_of(Path(name_or_path), config.base_model_name_or_path)
    model = QuietStarForCausalLM.from_pretrained(base, **kwargs)
    return peft.PeftModel.from_pretrained(model, str(name_or_path)).merge_and_unload()


def _base_of(adapter: Path, named: str | None) -> str:
    """Find the base model of an adapter: in the folder that it names or, if both were moved, next to the adapter."""
    if named is None or not Path(named).is_dir():
        for folder in (adapter / BASE_FOLDER, adapter.parent / BASE_FOLDER):
            if folder.is_dir():
                return str(folder)
    if named is None:
        raise ValueError(f"an adapter must name the model that it is for, got none in {adapter}")
    return named
