"""The registered op of the linear cross-entropies and the autograd functions around it.

The op computes the nll and, if asked, all gradients at once. A backend is a kernel for chunks of rows
(:class:`.chunks.ChunkKernel`), made of a row kernel and library matmuls if it has none of its own, and a way to mix
hidden states (:class:`.hidden.MixedHidden`).
"""

from functools import partial
from pkgutil import resolve_name

import torch
from torch import Tensor

from quietstar.ops._differentiable import once_differentiable
from quietstar.ops._precision import compute_dtype
from quietstar.ops._registration import register_op
from quietstar.ops._rows import BLOCK_BYTES, release_logits_buffer, rows_within, slices
from quietstar.ops._vocabulary import counted_nll, weighted_sum
from quietstar.ops.linear_cross_entropy.chunks import ChunkKernel, cross_entropy_in_chunks
from quietstar.ops.linear_cross_entropy.hidden import PlainHidden
from quietstar.ops.linear_cross_entropy.matmuls import cross_entropy_chunk

# Imported when they are first used: triton may be missing, and takes its time.
_ROW_KERNELS = {
    "torch": "library:cross_entropy_rows",
    "triton": "triton_kernels:cross_entropy_rows",
    "cuda": "native_cuda:cross_entropy_rows",
}
_CHUNK_KERNELS = {"cpu": "native_cpu:cross_entropy_chunk"}
_MIXED_HIDDEN = {
    "torch": "hidden:MixedHidden",
    "triton": "triton_hidden:FusedMixedHidden",
    "cuda": "hidden:MixedHidden",
    "cpu": "hidden:MixedHidden",
}


def _chunk_kernel(backend: str) -> ChunkKernel:
    if backend in _CHUNK_KERNELS:
        return resolve_name(f"{__package__}.{_CHUNK_KERNELS[backend]}")
    return partial(cross_entropy_chunk, resolve_name(f"{__package__}.{_ROW_KERNELS[backend]}"))


def _cross_entropy(
    hidden, thought_hidden, mixing_weight, weight, target, base_index, suppress, row_scale,
    temperature, every_nll, needs, backend,
):  # fmt: skip
    *needs_hidden, needs_weight = needs
    contributing = target >= 0
    if row_scale is not None:
        contributing &= row_scale != 0
    if thought_hidden is None:
        source = PlainHidden(hidden, needs_hidden[0])
    else:
        mixed = resolve_name(f"{__package__}.{_MIXED_HIDDEN[backend]}")
        source = mixed(hidden, thought_hidden, mixing_weight, base_index, needs_hidden, ~contributing)
    nll, d_weight = cross_entropy_in_chunks(
        _chunk_kernel(backend), source, weight, target, row_scale, contributing,
        temperature=temperature, suppress=suppress, every_nll=every_nll, weight_needs_gradient=needs_weight,
    )  # fmt: skip
    return nll, *(weight.new_empty(0) if d is None else d for d in (*source.gradients(), d_weight))


def _cross_entropy_fake(
    hidden, thought_hidden, mixing_weight, weight, target, base_index, suppress, row_scale,
    temperature, every_nll, needs, backend,
):  # fmt: skip
    wide = compute_dtype(weight.dtype)
    needs_hidden, needs_thought, needs_mixing, needs_weight = needs
    nothing = weight.new_empty(0)
    return (
        target.new_empty(target.shape, dtype=wide),
        hidden.new_empty(hidden.shape) if needs_hidden else nothing,
        thought_hidden.new_empty(thought_hidden.shape) if needs_thought else weight.new_empty(0),
        mixing_weight.new_empty(mixing_weight.shape, dtype=wide) if needs_mixing else weight.new_empty(0),
        weight.new_empty(weight.shape, dtype=wide) if needs_weight else weight.new_empty(0),
    )


_cross_entropy_op = register_op(
    "linear_cross_entropy(Tensor hidden, Tensor? thought_hidden, Tensor? mixing_weight, Tensor weight, Tensor target,"
    " Tensor? base_index, Tensor? suppress, Tensor? row_scale, float temperature, bool every_nll, bool[4] needs,"
    " str backend) -> (Tensor nll, Tensor d_hidden, Tensor d_thought_hidden, Tensor d_mixing_weight, Tensor d_weight)",
    _cross_entropy,
    _cross_entropy_fake,
)


def _scaled_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """New tensor gradient · factor, multiplied in the compute dtype.

    With a factor of as many dimensions, PyTorch converts element by element, on a GPU in the one pass; a CPU does so in
    temporary tensors, hence the blocks.
    """
    release_logits_buffer()  # the gradient is about to be held twice
    result = torch.empty_like(gradient, dtype=dtype)
    factor = factor.reshape([1] * gradient.dim())
    row_bytes = gradient[:1].numel() * gradient.element_size()
    for part in slices(gradient.shape[0], rows_within(BLOCK_BYTES, row_bytes, gradient.device)):
        torch.mul(gradient[part], factor, out=result[part])
    return result


_scaled_gradient_op = register_op(
    "scaled_gradient(Tensor gradient, Tensor factor, ScalarType dtype) -> Tensor",
    _scaled_gradient,
    lambda gradient, factor, dtype: torch.empty_like(gradient, dtype=dtype),
)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient · factor; the gradient itself for a factor of 1, where that can be seen without waiting for a device."""
    visible = gradient.device.type == "cpu" and not torch.compiler.is_compiling()
    if visible and gradient.dtype == dtype and factor == 1:
        return gradient
    return _scaled_gradient_op(gradient, factor, dtype)


def _peak(row_scale: Tensor, temperature: float) -> Tensor:
    """The largest |row_scale| / temperature: divided by it, no gradient of a logit is beyond 1, or float16."""
    if row_scale.shape[0] == 0:
        return row_scale.new_ones(())
    peak = row_scale.abs().amax() / temperature
    return torch.where(peak == 0, 1, peak)


def link_to(*inputs: Tensor | None) -> Tensor:
    """An empty tensor that depends on the inputs, for ``once_differentiable`` to tie gradients to; it keeps none."""
    return torch.cat([x[:0].flatten() for x in inputs if x is not None])


class ReducedCrossEntropy(torch.autograd.Function):
    """sum(row_scale · nll) and the nll; the gradients are made in the forward, three matmuls in all.

    ``link`` is :func:`link_to` the tensors that may need a gradient.
    """

    @staticmethod
    def forward(
        ctx, hidden, thought_hidden, mixing_weight, weight, row_scale, link, target, base_index, suppress,
        temperature, return_nll, needs, backend,
    ):  # fmt: skip
        *needs, needs_row_scale = needs
        # What 1 / rows would push below the smallest float16 is brought to size together with the incoming gradient.
        peak = _peak(row_scale, temperature) if weight.dtype == torch.float16 else row_scale.new_ones(())
        nll, *gradients = _cross_entropy_op(
            hidden, thought_hidden, mixing_weight, weight, target, base_index, suppress,
            row_scale / peak if any(needs) else row_scale, temperature,
            return_nll or needs_row_scale, needs, backend,
        )  # fmt: skip
        ctx.save_for_backward(*gradients, peak, counted_nll(row_scale, nll) if needs_row_scale else None, link)
        ctx.needs = (*needs, needs_row_scale)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, thought_hidden, mixing_weight, weight)]
        ctx.mark_non_differentiable(nll)
        return weighted_sum(row_scale, nll), nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        *gradients, peak, nll, _ = ctx.saved_tensors
        *needs, needs_row_scale = ctx.needs
        factor = grad_loss * peak
        wanted = (
            _scaled(gradient, factor, dtype) if needed else None
            for gradient, dtype, needed in zip(gradients, ctx.dtypes, needs, strict=True)
        )
        return *wanted, grad_loss * nll if needs_row_scale else None, *(None,) * 8


class RowCrossEntropy(torch.autograd.Function):
    """Per-row nll; the backward recomputes the logits, four matmuls in all."""

    @staticmethod
    def forward(
        ctx, hidden, thought_hidden, mixing_weight, weight, target, base_index, suppress, temperature, needs, backend
    ):
        ctx.save_for_backward(hidden, thought_hidden, mixing_weight, weight, target, base_index, suppress)
        ctx.options = temperature, needs, backend
        nll, *_ = _cross_entropy_op(
            hidden, thought_hidden, mixing_weight, weight, target, base_index, suppress,
            None, temperature, True, [False] * 4, backend,
        )  # fmt: skip
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll):
        temperature, needs, backend = ctx.options
        *inputs, target, base_index, suppress = ctx.saved_tensors
        peak = _peak(grad_nll, temperature) if inputs[-1].dtype == torch.float16 else None
        _, *gradients = _cross_entropy_op(
            *inputs, target, base_index, suppress, grad_nll if peak is None else grad_nll / peak,
            temperature, False, needs, backend,
        )  # fmt: skip
        wanted = (
            None if not needed else gradient.to(x.dtype) if peak is None else _scaled(gradient, peak, x.dtype)
            for gradient, x, needed in zip(gradients, inputs, needs, strict=True)
        )
        return *wanted, *(None,) * 6
