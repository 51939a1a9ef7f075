"""The registered ops of mixing and the autograd functions around them.

The ops take the backend's name; a backend has the four functions of ``library.py``. A gradient nobody asked for is an
empty tensor.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from quietstar.ops._differentiable import once_differentiable
from quietstar.ops._precision import compute_dtype
from quietstar.ops._registration import register_op
from quietstar.ops.mixing import library
from quietstar.ops.mixing.native import Native

_BACKENDS = {"torch": library, "cuda": Native("cuda"), "cpu": Native("cpu")}

_LOGITS = "Tensor base_logits, Tensor thought_logits, Tensor mixing_weight"


def _named(backend: str) -> ModuleType | Native:
    """The backend; triton is imported when it is first used: it may be missing, and takes its time."""
    return import_module(f"{__package__}.triton_kernels") if backend == "triton" else _BACKENDS[backend]


def _present(gradients: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_gradients(base: Tensor, thought: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    shapes = base.shape, thought.shape, base.shape[:-1]
    dtypes = base.dtype, base.dtype, compute_dtype(base.dtype)
    return tuple(
        base.new_empty(shape, dtype=dtype) if needed else base.new_empty(0)
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=False)
    )


_mix = register_op(
    f"mix_logits({_LOGITS}, str backend) -> Tensor",
    lambda base, thought, weight, backend: _named(backend).mix(base, thought, weight),
    lambda base, thought, weight, backend: base.new_empty(base.shape),
)

_mix_backward = register_op(
    f"mix_logits_backward(Tensor grad, {_LOGITS}, bool[3] needs, str backend) -> (Tensor, Tensor, Tensor)",
    lambda grad, base, thought, weight, needs, backend: _present(
        _named(backend).mix_backward(grad, base, thought, weight, needs), base
    ),
    lambda grad, base, thought, weight, needs, backend: _fake_gradients(base, thought, needs),
)

_cross_entropy = register_op(
    f"mixed_cross_entropy({_LOGITS}, Tensor target, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda base, thought, weight, target, backend: _named(backend).cross_entropy(base, thought, weight, target),
    lambda base, thought, weight, target, backend: tuple(
        base.new_empty(target.shape, dtype=compute_dtype(base.dtype)) for _ in range(4)
    ),
)

_cross_entropy_backward = register_op(
    f"mixed_cross_entropy_backward(Tensor scale, {_LOGITS}, Tensor target, Tensor largest, Tensor log_total,"
    " bool[2] needs, str backend) -> (Tensor, Tensor)",
    lambda scale, base, *others: _present(_named(others[-1]).cross_entropy_backward(scale, base, *others[:-1]), base),
    lambda scale, base, thought, weight, target, largest, log_total, needs, backend: _fake_gradients(
        base, thought, needs
    ),
)


class MixLogits(torch.autograd.Function):
    """(1 − w) · base + w · thought by a named backend."""

    @staticmethod
    def forward(ctx, base_logits, thought_logits, mixing_weight, backend):
        ctx.save_for_backward(base_logits, thought_logits, mixing_weight)
        ctx.backend = backend
        return _mix(base_logits, thought_logits, mixing_weight, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        gradients = _mix_backward(grad, *inputs, needs, ctx.backend)
        wanted = (
            gradient.to(x.dtype) if needed else None
            for gradient, x, needed in zip(gradients, inputs, needs, strict=True)
        )
        return *wanted, None


class MixedCrossEntropy(torch.autograd.Function):
    """Per-row nll of the mix by a named backend; ``target`` all in [0, V)."""

    @staticmethod
    def forward(ctx, base_logits, thought_logits, mixing_weight, target, backend):
        nll, slope, largest, log_total = _cross_entropy(base_logits, thought_logits, mixing_weight, target, backend)
        ctx.save_for_backward(base_logits, thought_logits, mixing_weight, target, slope, largest, log_total)
        ctx.backend = backend
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll):
        base, thought, mixing_weight, target, slope, largest, log_total = ctx.saved_tensors
        *needs, needs_weight = ctx.needs_input_grad[:3]
        gradients = (None, None)
        if any(needs):
            gradients = _cross_entropy_backward(
                grad_nll, base, thought, mixing_weight, target, largest, log_total, needs, ctx.backend
            )
        wanted = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
        d_weight = (grad_nll * slope).to(mixing_weight.dtype) if needs_weight else None
        return *wanted, d_weight, None, None
