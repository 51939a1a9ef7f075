"""Configurations of adapters (PEFT's LoRA) for Quiet-STaR, and of quantised weights below them (QLoRA)."""

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

# What Quiet-STaR adds to a model is small and new: it is trained as a whole and saved with the adapter.
_TRAINED_WHOLE = ("start_embedding", "end_embedding", "mixing_head", "gain_head")  # as far as the model has them

_ROUTERS = {"gate", "router", "shared_expert_gate"}  # of mixtures of experts, which adapters leave alone


def lora_config(
    model: QuietStarForCausalLM, r: int = 16, lora_alpha: float | None = None, lora_dropout: float = 0.0, **options
) -> "LoraConfig":
    """PEFT's configuration of LoRA on attention and MLP, with the thought embeddings and the mixing head trained whole.

    >>> model = peft.get_peft_model(model, lora_config(model, r=16))
    >>> QuietStarTrainer(model, ...).train()

    Args:
        r: rank.
        lora_alpha: adapters count lora_alpha / r times; default 2 · r.
        lora_dropout: in front of adapters, in training.
        options: of ``peft.LoraConfig``; ``target_modules`` and ``modules_to_save`` replace what this function chooses.

    Raises:
        ImportError: PEFT is not installed.
        TypeError, ValueError: another model, or a rank below 1.
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
    """Names that the linear layers of attention and MLP have within their modules, such as q_proj."""
    layers = model.get_decoder().layers
    names = {name.rpartition(".")[-1] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    return sorted(names - _ROUTERS)


def four_bits(compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """Weights of 4 bits as in QLoRA (arXiv 2305.14314): NormalFloat, its constants quantised once more.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    require("bitsandbytes", "load_in_4bit", "qlora")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )  # fmt: skip
