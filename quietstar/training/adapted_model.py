"""The model that `quietstar train --lora_r` trains: a frozen model with adapters."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from quietstar._packages import require
from quietstar.models import QuietStarConfig, QuietStarForCausalLM
from quietstar.models.adapters import BASE_FOLDER
from quietstar.training.arguments import ModelArguments
from quietstar.training.lora import four_bits, lora_config

if TYPE_CHECKING:
    from peft import PeftModel


def check_packages(arguments: ModelArguments) -> None:
    """Check that the packages which the flags need are installed.

    Raises:
        ImportError: a package is missing; the message says how to install it.
    """
    if arguments.lora_r is not None:
        require("peft", "lora_r", "peft")
    if arguments.load_in_4bit:
        require("bitsandbytes", "load_in_4bit", "qlora")


def with_adapters(
    model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerBase, arguments: ModelArguments,
    training: TrainingArguments,
) -> "PeftModel":  # fmt: skip
    """Add new adapters to the model; only these are trained and saved.

    An adapter is useful only together with its base model. If that is not an unchanged Quiet-STaR checkpoint, it is
    saved to ``output_dir/base_model``.

    Raises:
        ValueError: the model would overwrite itself.
    """
    peft = require("peft", "lora_r", "peft")
    base = _kept_base(model, tokenizer, arguments, training)
    options = {"dtype": model.dtype}
    if arguments.load_in_4bit:
        on_cpu = training.device.type == "cpu"
        options["quantization_config"] = four_bits(model.dtype if on_cpu else torch.bfloat16)
        options["device_map"] = {"": training.device}
    if arguments.load_in_4bit or training.resume_from_checkpoint:
        model = QuietStarForCausalLM.from_pretrained(base, **options)
    if arguments.load_in_4bit:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.name_or_path = base
    dropout = 0.0 if arguments.lora_dropout is None else arguments.lora_dropout
    return peft.get_peft_model(model, lora_config(model, arguments.lora_r, arguments.lora_alpha, dropout))


def _kept_base(
    model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerBase, arguments: ModelArguments,
    training: TrainingArguments,
) -> str:  # fmt: skip
    """Return where the base model is saved, after saving it if necessary."""
    source = Path(arguments.model)
    saved, _ = PreTrainedConfig.get_config_dict(arguments.model)
    if saved.get("model_type") == QuietStarConfig.model_type and not arguments.config_fields():
        return str(source.resolve()) if source.is_dir() else arguments.model
    folder = Path(training.output_dir, BASE_FOLDER).resolve()
    if source.resolve() == folder:
        raise ValueError(
            f"output_dir must not be the folder around model with other fields of its configuration, got "
            f"{training.output_dir}: the model would be written over itself"
        )
    with training.main_process_first(local=False, desc="keeping the model that the adapter is for"):
        if training.process_index == 0 and not (training.resume_from_checkpoint and folder.is_dir()):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return str(folder)
