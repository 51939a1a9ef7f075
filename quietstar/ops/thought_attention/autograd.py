"""The registered ops of thought attention and the autograd function around them.

The ops take the backend's name; a backend is a module with ``forward`` and ``backward`` of the signatures in
``library.py``. A gradient nobody asked for is an empty tensor.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from quietstar.ops._differentiable import once_differentiable
from quietstar.ops._precision import compute_dtype
from quietstar.ops._registration import register_op

_MODULES = {"torch": "library", "triton": "triton_backend", "cuda": "native_cuda", "cpu": "native_cpu"}

_KEYS = "Tensor query, Tensor key, Tensor value, Tensor thought_key, Tensor thought_value"
_MASK = "Tensor? anchors, Tensor? key_start, int? window, float scale, str backend"


def _module(backend: str) -> ModuleType:
    """The backend's module, imported when it is first used: triton may be missing, and takes its time."""
    return import_module(f"{__package__}.{_MODULES[backend]}")


def _sees_nothing(query: Tensor, key: Tensor) -> bool:
    """Whether there is no query, or no base key: then every anchor is inactive. Backends need not know such sizes."""
    return query.numel() == 0 or key.shape[2] == 0


def _forward(query, key, value, thought_key, thought_value, anchors, key_start, window, scale, backend):
    if _sees_nothing(query, key):
        output, lse = _forward_fake(query, key)
        return output.zero_(), lse.fill_(-torch.inf)
    output, lse = _module(backend).forward(
        query, key, value, thought_key, thought_value, anchors, key_start, window, scale
    )
    return output.contiguous(), lse.contiguous()


def _forward_fake(query, *_):
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=compute_dtype(query.dtype))


def _backward(
    grad_output, grad_lse, query, key, value, thought_key, thought_value, output, lse,
    anchors, key_start, window, scale, backend,
):  # fmt: skip
    if _sees_nothing(query, key):
        return tuple(x.new_zeros(x.shape) for x in (query, key, value, thought_key, thought_value))
    grads = _module(backend).backward(
        grad_output, grad_lse, query, key, value, thought_key, thought_value, output, lse,
        anchors, key_start, window, scale,
    )  # fmt: skip
    return tuple(grad.contiguous() for grad in grads)


def _backward_fake(grad_output, grad_lse, query, key, value, thought_key, thought_value, *_):
    return tuple(x.new_empty(x.shape) for x in (query, key, value, thought_key, thought_value))


_forward_op = register_op(f"thought_attention({_KEYS}, {_MASK}) -> (Tensor, Tensor)", _forward, _forward_fake)
_backward_op = register_op(
    f"thought_attention_backward(Tensor grad_output, Tensor? grad_lse, {_KEYS}, Tensor output, Tensor lse, {_MASK})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class ThoughtAttention(torch.autograd.Function):
    """Thought attention by a named backend; once differentiable."""

    @staticmethod
    def forward(ctx, query, key, value, thought_key, thought_value, anchors, key_start, window, scale, backend):
        output, lse = _forward_op(
            query, key, value, thought_key, thought_value, anchors, key_start, window, scale, backend
        )
        ctx.save_for_backward(query, key, value, thought_key, thought_value, output, lse, anchors, key_start)
        ctx.options = window, scale, backend
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_lse):
        *saved, anchors, key_start = ctx.saved_tensors
        if grad_output is None:
            if grad_lse is None:
                return (None,) * 10
            grad_output = torch.zeros_like(saved[0])
        grads = _backward_op(grad_output, grad_lse, *saved, anchors, key_start, *ctx.options)
        wanted = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None, None, None
