"""The model without data: what its weights take, and what of them is trained, with adapters and in 4 bits too."""

import json
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quietstar._packages import require
from quietstar.models import QuietStarConfig, QuietStarForCausalLM


class Weights(NamedTuple):
    """Some of the weights."""

    bytes: int
    trained: int
    """Elements."""
    trained_bytes: int

    def without(self, others: "Iterable[Weights]") -> "Weights":
        """What is not among the others."""
        return Weights(*(mine - sum(theirs) for mine, *theirs in zip(self, *others, strict=True)))


class FourBitLinear(nn.Linear):
    """What bitsandbytes' ``Linear4bit`` holds while it runs: its weight whole, for as long as one product takes."""

    def forward(self, hidden: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        result = _ProductOfFourBits.apply(hidden.to(dtype), self.weight)
        return (result if self.bias is None else result + self.bias.to(dtype)).to(hidden.dtype)


class _ProductOfFourBits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.weight = weight
        rows = hidden.flatten(0, -2) @ torch.empty(weight.shape, dtype=hidden.dtype, device=hidden.device).t()
        return rows.view(*hidden.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        rows = gradient.flatten(0, -2) @ torch.empty(ctx.weight.shape, dtype=gradient.dtype, device=gradient.device)
        return rows.view(*gradient.shape[:-1], -1), None


class Skeleton:
    """A model on the meta device, as `quietstar train` makes it.

    Args:
        config: of the model.
        dtype: of its weights.
        lora_r: rank of adapters, which alone are trained then, with what Quiet-STaR adds; None trains all weights.
        load_in_4bit: whether the linear layers of the decoder have 4 bits; all other weights then have 32.
    """

    def __init__(self, config: QuietStarConfig, dtype: torch.dtype, lora_r: int | None, load_in_4bit: bool):
        with torch.device("meta"):
            model = QuietStarForCausalLM._from_config(config, dtype=dtype)
            if load_in_4bit:
                model = model.float()
                _to_four_bits(model.model)
            self.base_elements = model.num_parameters()
            self.model = model
            if lora_r is not None:
                from quietstar.training.lora import lora_config

                self.model = require("peft", "lora_r", "peft").get_peft_model(model, lora_config(model, lora_r))
        self.decoder = model.model
        head, embedding = model.lm_head.weight, self.decoder.embed_tokens.weight
        self.state_dtype = embedding.dtype
        self.trains_head, self.trains_embedding = head.requires_grad, embedding.requires_grad
        self.is_tied = head is embedding
        """Whether embedding and head are one matrix."""
        self.small = weights_of(nn.ModuleList(filter(None, (model.mixing_head, model.gain_head))))
        """Mixing and gain head."""
        self.thought_embeddings = weights_of(nn.ModuleList((model.start_embedding, model.end_embedding)))

    @cached_property
    def whole(self) -> Weights:
        """All weights, those that are tied once."""
        return weights_of(self.model)

    @cached_property
    def layers(self) -> list[Weights]:
        """Each layer of the decoder."""
        return [weights_of(layer) for layer in self.decoder.layers]

    @cached_property
    def others(self) -> Weights:
        """What is in no layer."""
        return self.whole.without(self.layers)

    @cached_property
    def largest_trained(self) -> int:
        """Elements of the largest tensor that is trained."""
        return max((x.numel() for x in self.model.parameters() if x.requires_grad), default=0)


def weights_of(module: nn.Module) -> Weights:
    """What a module weighs."""
    four_bits = {id(part.weight) for part in module.modules() if isinstance(part, FourBitLinear)}
    sizes = []
    for x in module.parameters():
        size = four_bits_bytes(x.numel()) if id(x) in four_bits else x.nbytes
        sizes.append((size, x.numel() * x.requires_grad, size * x.requires_grad))
    return Weights(*(map(sum, zip(*sizes, strict=True)) if sizes else [0] * 3))


def four_bits_bytes(elements: int) -> int:
    """What a matrix takes in NormalFloat with its constants quantised once more (QLoRA, arXiv 2305.14314, section 3).

    Half a byte for each weight, one byte for the constant of every 64, four for that of every 256 constants, and two
    tables in float32 of what the 16 and the 256 values mean.
    """
    constants = -(-elements // 64)
    return -(-elements // 2) + constants + 4 * -(-constants // 256) + 4 * (16 + 256)


def _to_four_bits(decoder: nn.Module) -> None:
    decoder.requires_grad_(False)
    for module in list(decoder.modules()):
        for name, part in module.named_children():
            if type(part) is nn.Linear:
                four_bits = FourBitLinear(part.in_features, part.out_features, part.bias is not None)
                module.add_module(name, four_bits.float().requires_grad_(False))


@lru_cache(maxsize=16)
def _skeleton(config: str, *options) -> Skeleton:
    return Skeleton(QuietStarConfig.from_dict(json.loads(config)), *options)


def skeleton_of(config: QuietStarConfig, dtype: torch.dtype, lora_r: int | None, load_in_4bit: bool) -> Skeleton:
    """The skeleton of equal arguments, made once."""
    return _skeleton(config.to_json_string(use_diff=False), dtype, lora_r, load_in_4bit)
