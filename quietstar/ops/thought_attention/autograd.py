"""The registered ops of thought attention and the autograd function around them.

Registered ops take only tensors and numbers: the fields of ``Inputs`` and ``Mask`` one by one, and a backend's name.
"""

import torch
from torch import Tensor

from quietstar.ops._precision import compute_dtype
from quietstar.ops._registration import once_differentiable, register_op
from quietstar.ops.thought_attention.backends import BACKENDS
from quietstar.ops.thought_attention.inputs import Inputs, Mask, Result, ResultGradients

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor thought_key, Tensor thought_value"
_MASK = (
    "Tensor? anchors, Tensor? key_start, Tensor? thought_lengths, int? window, bool window_from_step, bool causal, "
    "float scale, float? softcap"
)
_NUM_INPUTS = len(Inputs._fields)


def _sees_nothing(inputs: Inputs) -> bool:
    """Whether there is no query, or no base key and so no active anchor. Backends need not handle these sizes."""
    return inputs.query.numel() == 0 or inputs.key.shape[2] == 0


def _forward(*arguments):
    inputs, mask, backend = Inputs(*arguments[:_NUM_INPUTS]), Mask(*arguments[_NUM_INPUTS:-1]), arguments[-1]
    if _sees_nothing(inputs):
        output, lse = _forward_fake(*inputs)
        return output.zero_(), lse.fill_(-torch.inf)
    output, lse = BACKENDS[backend].load().forward(inputs, mask)
    return output.contiguous(), lse.contiguous()


def _forward_fake(*arguments):
    inputs = Inputs(*arguments[:_NUM_INPUTS])
    query = inputs.query
    return query.new_empty(inputs.output_shape), query.new_empty(query.shape[:-1], dtype=compute_dtype(query.dtype))


def _backward(grad_output, grad_lse, *arguments):
    inputs, (output, lse, *mask, backend) = Inputs(*arguments[:_NUM_INPUTS]), arguments[_NUM_INPUTS:]
    if _sees_nothing(inputs):
        return tuple(x.new_zeros(x.shape) for x in inputs)
    gradients, result = ResultGradients(grad_output, grad_lse), Result(output, lse)
    grads = BACKENDS[backend].load().backward(gradients, inputs, Mask(*mask), result)
    return tuple(grad.contiguous() for grad in grads)


def _backward_fake(grad_output, grad_lse, *arguments):
    return tuple(x.new_empty(x.shape) for x in arguments[:_NUM_INPUTS])


_forward_op = register_op(f"thought_attention({_INPUTS}, {_MASK}, str backend) -> (Tensor, Tensor)",
                          _forward, _forward_fake)  # fmt: skip
_backward_op = register_op(
    f"thought_attention_backward(Tensor grad_output, Tensor? grad_lse, {_INPUTS}, Tensor output, Tensor lse, {_MASK},"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class ThoughtAttention(torch.autograd.Function):
    """Thought attention by named backends, once differentiable: ``apply(*inputs, *mask, forward's, backward's)``."""

    @staticmethod
    def forward(ctx, *arguments) -> tuple[Tensor, Tensor]:
        *arguments, backward = arguments
        output, lse = _forward_op(*arguments)
        inputs, mask = arguments[:_NUM_INPUTS], Mask(*arguments[_NUM_INPUTS:-1])
        ctx.save_for_backward(*inputs, output, lse, mask.anchors, mask.key_start, mask.thought_lengths)
        ctx.options = mask[3:], backward
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_lse):
        unneeded = (None,) * (len(Mask._fields) + 2)
        if grad_output is None and grad_lse is None:
            return (None,) * _NUM_INPUTS + unneeded
        *saved, anchors, key_start, thought_lengths = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(saved[_NUM_INPUTS])
        options, backend = ctx.options
        grads = _backward_op(grad_output, grad_lse, *saved, anchors, key_start, thought_lengths, *options, backend)
        wanted = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))
        return *wanted, *unneeded
