"""Gradients that have no gradient of their own."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import function


def once_differentiable(backward: Callable) -> Callable:
    """Mark the ``backward`` of an ``autograd.Function``: differentiating its results is a RuntimeError.

    PyTorch's decorator of that name does so only where the incoming gradient has a graph. That of ``sum()`` has none:
    with ``create_graph=True`` the results would then have none either, and a penalty on them would do nothing.
    """
    once = function.once_differentiable(backward)

    @functools.wraps(backward)
    def marked(ctx: object, *gradients: Tensor | None) -> object:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = [None if x is None else x.detach().requires_grad_() for x in gradients]
        return once(ctx, *gradients)

    return marked
