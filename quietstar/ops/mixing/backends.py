"""The backends of mixing. The device and dtype of the logits decide which can run.

Each is a module, or an object, with

    mix(mix) -> [..., V] in the dtype of the logits, computed in the compute dtype
    mix_backward(grad, mix, needs) -> gradients of base, thought and, in the compute dtype, weight
    cross_entropy(mix, target) -> CrossEntropy, from one pass over the logits
    cross_entropy_backward(scale, mix, target, result, needs) -> gradients of sum(scale · nll) w.r.t. base and thought

A gradient that is not needed is None. ``target`` [...] is int64, all in [0, V); ``scale`` [...] is 0 for rows without a
gradient, whose logits may be anything. The reference is called directly, and autograd computes its gradients.
"""

from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from quietstar.ops._backend import usual_backends

if TYPE_CHECKING:
    from quietstar.ops.mixing.backend_native import Native


class Mix(NamedTuple):
    """Two predictions and the weight of the second: (1 − weight) · base + weight · thought."""

    base: Tensor  # [..., V]
    thought: Tensor  # [..., V]
    weight: Tensor  # [...]


class CrossEntropy(NamedTuple):
    """Results for every row [...], in the compute dtype.

    The backward recomputes probabilities from ``largest`` and ``log_total``. They are kept apart because their sum
    would lose digits where logits are large.
    """

    nll: Tensor
    slope: Tensor  # derivative of nll w.r.t. the weight: E[t − b] under the mix minus t − b at the target
    largest: Tensor  # largest mixed logit
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
