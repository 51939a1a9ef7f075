"""Registration of ops with PyTorch, so that ``torch.compile`` and ``opcheck`` see each as one opaque call.

``once_differentiable`` makes differentiating their gradients an error.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from quietstar.ops._precision import autocast_off

_LIBRARY = torch.library.Library("quietstar", "FRAGMENT")


def register_op(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Register ``quietstar::<schema>`` and return the callable op.

    Autograd is handled outside, by an ``autograd.Function`` that calls the op. The implementation runs with autocast
    off, since ops choose their dtypes themselves, also if a backward happens to run inside an autocast region. The
    device of the first tensor is the current device, on which Triton launches kernels.

    Args:
        schema: name, arguments and results in PyTorch's schema language; the first argument is a tensor.
        implementation: function that runs on real tensors of any device.
        fake: function that allocates results of the same shapes, strides, dtypes and devices without computing them.
    """
    name = schema.partition("(")[0]

    def run(first: Tensor, *others: object) -> object:
        with autocast_off(first.device), torch.cuda.device_of(first):
            return implementation(first, *others)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quietstar::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.quietstar, name).default


def once_differentiable(backward: Callable) -> Callable:
    """Decorate the ``backward`` of an ``autograd.Function`` so that differentiating its results is a RuntimeError.

    PyTorch's decorator of the same name raises only if the incoming gradient has a graph. The gradient of ``sum()`` has
    none; then results under ``create_graph=True`` would have none either, and a penalty on them would silently do
    nothing.
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
    """Return the first ``count`` tensors as if they depended on all of them; the backward raises an error."""

    @staticmethod
    def forward(ctx, name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tensors[:count]

    @staticmethod
    def backward(ctx, *_: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.name} is not differentiable: fused kernels have no second derivative (backend='reference' has)"
        )
