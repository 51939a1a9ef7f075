"""Gradients that have no gradient of their own."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def once_differentiable(backward: Callable) -> Callable:
    """Mark the ``backward`` of an ``autograd.Function``: to differentiate its results is a RuntimeError.

    PyTorch's decorator of that name sees to it only where the incoming gradient has a graph. That of ``sum()`` has
    none, and the results of ``create_graph=True`` would have none either: a penalty on them would do nothing.
    """

    @functools.wraps(backward)
    def marked(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return results
        return _Final.apply(backward.__qualname__, len(results), *results, *ctx.saved_tensors, *gradients)

    return marked


class _Final(torch.autograd.Function):
    """Hands on the first ``count`` tensors as if they came from all of them, and refuses to say how."""

    @staticmethod
    def forward(ctx, name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tensors[:count]

    @staticmethod
    def backward(ctx, *_: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.name} is not differentiable: fused kernels have no second derivative (backend='reference' has)"
        )
