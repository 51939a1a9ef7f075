"""Configurations of LoRA adapters (PEFT) for Quiet-STaR, and of quantised weights for QLoRA."""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from quietstar._numbers import Interval
from quietstar._packages import require
from quietstar.models import QuietStarForCausalLM

if TYPE_CHECKING:
    from peft import LoraConfig

_RANK = Interval(int, "[1, inf)")

# The modules that Quiet-STaR adds to a model are small and new, so they are fully trained and saved with the adapter.
_TRAINED_WHOLE = ("start_embedding", "end_embedding", "mixing_head", "gain_head")  # those that the model has

_ROUTERS = {"gate", "router", "shared_expert_gate"}  # in mixtures of experts; they get no adapters


def lora_config(
    model: QuietStarForCausalLM, r: int = 16, lora_alpha: float | None = None, lora_dropout: float = 0.0, **options
) -> "LoraConfig":
    """Create PEFT's configuration for LoRA on attention and MLP; thought embeddings and heads are fully trained.

    >>> model = peft.get_peft_model(model, lora_config(model, r=16))
    >>> QuietStarTrainer(model, ...).train()

    Args:
        model: the model to adapt.
        r: rank.
        lora_alpha: adapters are scaled by lora_alpha / r. Default: 2 · r.
        lora_dropout: dropout before adapters in training.
        options: options of ``peft.LoraConfig``; ``target_modules`` and ``modules_to_save`` replace the choices made
            here.

    Raises:
        ImportError: PEFT is not installed.
        TypeError, ValueError: ``model`` is not a Quiet-STaR model, or the rank is below 1.
    """
    peft = require("peft", "lora_config", "peft")
    if not isinstance(model, QuietStarForCausalLM):
        raise TypeError(f"model must be a QuietStarForCausalLM, got {type(model).__name__}")
    _RANK.check("r", r)
    defaults = {
        "task_type": "CAUSAL_LM", "target_modules": _linear_layers(model), "modules_to_save": _trained_whole(model),
    }  # fmt: skip
    alpha = 2 * r if lora_alpha is None else lora_alpha
    return peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=lora_dropout, **defaults | options)


def _trained_whole(model: QuietStarForCausalLM) -> list[str]:
    parts = dict(model.named_children())
    return [name for name in _TRAINED_WHOLE if name in parts and any(True for _ in parts[name].parameters())]


def _linear_layers(model: QuietStarForCausalLM) -> list[str]:
    """Return the names of the linear layers of attention and MLP within their modules, such as q_proj."""
    layers = model.get_decoder().layers
    names = {name.rpartition(".")[-1] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    return sorted(names - _ROUTERS)


def four_bits(compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """Create the configuration of 4-bit weights as in QLoRA (arXiv 2305.14314): NormalFloat, double quantisation.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    require("bitsandbytes", "load_in_4bit", "qlora")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )  # fmt: skip
