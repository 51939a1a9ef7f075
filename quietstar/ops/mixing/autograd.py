"""The registered ops of mixing and the autograd functions around them.

The ops take the tensors of a ``.backends.Mix`` one by one, and a backend's name. They return an empty tensor in place
of a gradient that is not needed.
"""

import torch
from torch import Tensor

from quietstar.ops._precision import compute_dtype
from quietstar.ops._registration import once_differentiable, register_op
from quietstar.ops.mixing.backends import BACKENDS, CrossEntropy, Mix

_MIX = "Tensor base_logits, Tensor thought_logits, Tensor mixing_weight"


def _present(gradients: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_gradients(mix: Mix, needs: list[bool]) -> tuple[Tensor, ...]:
    dtypes = mix.base.dtype, mix.base.dtype, compute_dtype(mix.base.dtype)
    return tuple(
        mix.base.new_empty(x.shape, dtype=dtype) if needed else mix.base.new_empty(0)
        for x, dtype, needed in zip(mix, dtypes, needs, strict=False)
    )


_mix = register_op(
    f"mix_logits({_MIX}, str backend) -> Tensor",
    lambda *mix_and_backend: BACKENDS[mix_and_backend[-1]].load().mix(Mix(*mix_and_backend[:-1])),
    lambda base, *_: base.new_empty(base.shape),
)


def _run_mix_backward(grad, base, thought, weight, needs, backend):
    return _present(BACKENDS[backend].load().mix_backward(grad, Mix(base, thought, weight), needs), base)


_mix_backward = register_op(
    f"mix_logits_backward(Tensor grad, {_MIX}, bool[3] needs, str backend) -> (Tensor, Tensor, Tensor)",
    _run_mix_backward,
    lambda grad, base, thought, weight, needs, backend: _fake_gradients(Mix(base, thought, weight), needs),
)

_cross_entropy = register_op(
    f"mixed_cross_entropy({_MIX}, Tensor target, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda base, thought, weight, target, backend: tuple(
        BACKENDS[backend].load().cross_entropy(Mix(base, thought, weight), target)
    ),
    lambda base, thought, weight, target, backend: tuple(
        base.new_empty(target.shape, dtype=compute_dtype(base.dtype)) for _ in CrossEntropy._fields
    ),
)


def _run_cross_entropy_backward(scale, base, thought, weight, target, *others):
    *result, needs, backend = others
    run = BACKENDS[backend].load().cross_entropy_backward
    return _present(run(scale, Mix(base, thought, weight), target, CrossEntropy(*result), needs), base)


_cross_entropy_backward = register_op(
    f"mixed_cross_entropy_backward(Tensor scale, {_MIX}, Tensor target, Tensor nll, Tensor slope, Tensor largest,"
    " Tensor log_total, bool[2] needs, str backend) -> (Tensor, Tensor)",
    _run_cross_entropy_backward,
    lambda scale, base, thought, weight, *others: _fake_gradients(Mix(base, thought, weight), others[-2]),
)


class MixLogits(torch.autograd.Function):
    """(1 − w) · base + w · thought: ``apply(*mix, backend)``."""

    @staticmethod
    def forward(ctx, *mix_and_backend):
        *mix, ctx.backend = mix_and_backend
        ctx.save_for_backward(*mix)
        return _mix(*mix_and_backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        mix = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        gradients = _mix_backward(grad, *mix, needs, ctx.backend)
        wanted = (
            gradient.to(x.dtype) if needed else None for gradient, x, needed in zip(gradients, mix, needs, strict=True)
        )
        return *wanted, None


class MixedCrossEntropy(torch.autograd.Function):
    """Per-row nll of the mix: ``apply(*mix, target, backend)``, with all of ``target`` in [0, V)."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, ctx.backend = arguments
        result = _cross_entropy(*arguments)
        ctx.save_for_backward(*inputs, *result)
        return result[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll):
        *mix, target, nll, slope, largest, log_total = ctx.saved_tensors
        *needs, needs_weight = ctx.needs_input_grad[:3]
        gradients = (None, None)
        if any(needs):
            gradients = _cross_entropy_backward(
                grad_nll, *mix, target, nll, slope, largest, log_total, needs, ctx.backend
            )
        wanted = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
        d_weight = (grad_nll * slope).to(mix[2].dtype) if needs_weight else None
        return *wanted, d_weight, None, None
