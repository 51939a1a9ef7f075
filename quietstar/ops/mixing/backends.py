"""The backends of mixing: they take what the logits lie on and are of.

Each is a module, or an object, with

    mix(mix) -> [..., V] in the dtype of the logits, computed in the compute dtype
    mix_backward(grad, mix, needs) -> gradients of base, thought and, in the compute dtype, weight
    cross_entropy(mix, target) -> CrossEntropy, from one pass over the logits
    cross_entropy_backward(scale, mix, target, result, needs) -> gradients of sum(scale · nll) by base and thought

A gradient that is not needed is None. ``target`` [...] is int64, all in [0, V); ``scale`` [...] is 0 for rows without a
gradient, whose logits may be anything. The reference is called by itself: its gradients are made by autograd.
"""

from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from quietstar.ops._backend import usual_backends

if TYPE_CHECKING:
    from quietstar.ops.mixing.backend_native import Native


class Mix(NamedTuple):
    """Two predictions, and what the second weighs: (1 − weight) · base + weight · thought."""

    base: Tensor  # [..., V]
    thought: Tensor  # [..., V]
    weight: Tensor  # [...]


class CrossEntropy(NamedTuple):
    """Of every row [...], in the compute dtype.

    What the backward needs to find the probabilities again is kept apart: the sum would lose digits where logits are
    large.
    """

    nll: Tensor
    slope: Tensor  # derivative of nll by the weight: E[t − b] under the mix minus t − b at the target
    largest: Tensor  # mixed logit
    log_total: Tensor  # log Σ exp(z − largest)


def _triton() -> ModuleType:
    from quietstar.ops.mixing import backend_triton

    return backend_triton


def _cuda() -> "Native":
    from quietstar.ops.mixing.backend_native import Native

    return Native("cuda")


def _cpu() -> "Native":
    from quietstar.ops.mixing.backend_native import Native

    return Native("cpu")


def _torch() -> ModuleType:
    from quietstar.ops.mixing import backend_torch

    return backend_torch


def _reference() -> ModuleType:
    from quietstar.ops.mixing import reference

    return reference


BACKENDS = usual_backends(triton=_triton, cuda=_cuda, cpu=_cpu, torch=_torch, reference=_reference)
