"""The weight matrix of a linear layer, for ops that multiply by it themselves."""

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quietstar.ops._dtensor import is_dtensor


def weight_of(name: str, layer: nn.Module) -> Tensor:
    """Return the matrix that ``layer`` multiplies by, [out, in], differentiable in the layer's parameters.

    For a layer wrapped by PEFT it includes the adapter: LoRA (without dropout in training), or a module that is trained
    as a whole (``modules_to_save``). A weight sharded by FSDP is a DTensor.

    Args:
        name: name of the layer, for messages.
        layer: a linear layer without a bias.

    Raises:
        ValueError: the layer does more than multiply by a matrix, so using only its weight would be wrong.
    """
    if _is_matrix(layer):
        return layer.weight
    if hasattr(layer, "modules_to_save"):
        adapters = layer.active_adapters
        if layer.disable_adapters or not adapters:
            return weight_of(name, layer.original_module)
        return weight_of(name, layer.modules_to_save[adapters[0]])
    if hasattr(layer, "lora_A") and _is_matrix(layer.get_base_layer()):
        return _with_lora(name, layer)
    raise ValueError(
        f"{name} must be a torch.nn.Linear with a weight of its own, with LoRA or as one of PEFT's modules_to_save at "
        f"most, because the ops read its weight; got {type(layer).__name__} of {type(_weight(layer)).__name__}"
    )


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer is an ordinary linear layer: neither wrapped, nor quantised, nor sharded."""
    return _is_matrix(layer) and not is_dtensor(layer.weight)


def _is_matrix(layer: nn.Module) -> bool:
    """Like ``is_plain``, but the layer may be sharded."""
    return (
        isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward
        and layer.weight.is_floating_point()
        and (is_dtensor(layer.weight) or not is_traceable_wrapper_subclass(layer.weight))
    )


def _weight(layer: nn.Module) -> Tensor | None:
    return getattr(layer, "weight", None)


def _with_lora(name: str, layer: nn.Module) -> Tensor:
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as the layer's forward does
    weight = layer.get_base_layer().weight
    if layer.disable_adapters or layer.merged:
        return weight
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        if adapter in getattr(layer, "lora_variant", {}) or getattr(layer, "lora_bias", {}).get(adapter):
            raise ValueError(f"{name} must have LoRA in its plain form, got a variant or a bias in adapter {adapter!r}")
        dropout = layer.lora_dropout[adapter]
        if layer.training and not isinstance(dropout, nn.Identity) and dropout.p > 0:
            raise ValueError(
                f"{name} must have LoRA without dropout, got lora_dropout = {dropout.p} in adapter {adapter!r}: the "
                "ops multiply with the sum of both matrices"
            )
        weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight
