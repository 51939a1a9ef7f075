"""How ops are registered with PyTorch, so that ``torch.compile`` and ``opcheck`` see each as one opaque call.

And how their gradients say that they have none of their own.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from quietstar.ops._precision import autocast_off

_LIBRARY = torch.library.Library("quietstar", "FRAGMENT")


def register_op(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Register ``quietstar::<schema>`` and return the callable op.

    Autograd stays outside, in an ``autograd.Function`` that calls the op. The implementation runs with autocast off:
    an op chooses its dtypes itself, also when its backward happens to run inside an autocast region. It runs with the
    device of the first tensor current, which is where Triton launches kernels.

    Args:
        schema: name, arguments and results in the schema language of PyTorch; the first argument is a tensor.
        implementation: what runs on real tensors of any device.
        fake: allocates results of the same shapes, strides, dtypes and devices without computing anything.
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
