"""The registered op of the linear cross-entropies and the autograd functions around it.

The op computes nll and entropy and, if needed, all gradients at once. It takes the fields of an ``inputs.Call`` one
by one, and a backend's name.
"""

import torch
from torch import Tensor

from quietstar.ops._head_matmuls import weight_gradient_dtype
from quietstar.ops._precision import compute_dtype
from quietstar.ops._registration import once_differentiable, register_op
from quietstar.ops._rows import BLOCK_BYTES, release_logits_buffer, rows_within, slices
from quietstar.ops._vocabulary import Softmax, counted, weighted_sum
from quietstar.ops.linear_cross_entropy.backends import BACKENDS
from quietstar.ops.linear_cross_entropy.chunks import cross_entropy_in_chunks
from quietstar.ops.linear_cross_entropy.inputs import Call, Hidden, PlainHidden, Scales


def _cross_entropy(*arguments):
    call, module = Call.of(*arguments[:-1]), BACKENDS[arguments[-1]].load()
    contributing = call.target >= 0
    if call.scales is not None:
        contributing &= call.scales.contributing
    *needs_hidden, _ = call.needs
    if call.hidden.thought is None:
        source = PlainHidden(call.hidden.hidden, needs_hidden[0])
    else:
        source = module.MixedHidden(*call.hidden, needs_hidden, ~contributing)
    nll, entropy, d_weight = cross_entropy_in_chunks(module.solve_chunk, source, call, contributing)
    return nll, *(nll.new_empty(0) if x is None else x for x in (entropy, *source.gradients(), d_weight))


def _cross_entropy_fake(*arguments):
    call = Call.of(*arguments[:-1])
    wide = compute_dtype(call.weight.dtype)
    rows = call.target.shape
    tensors = call.hidden.hidden, call.hidden.thought, call.hidden.mixing_weight, call.weight
    dtypes = call.weight.dtype, call.weight.dtype, wide, weight_gradient_dtype(call.weight)
    gradients = (
        x.new_empty(x.shape, dtype=dtype) if needed else call.weight.new_empty(0, dtype=wide)
        for x, dtype, needed in zip(tensors, dtypes, call.needs, strict=True)
    )
    nll = call.weight.new_empty(rows, dtype=wide)
    return nll, call.weight.new_empty(rows if call.entropy else 0, dtype=wide), *gradients


_HIDDEN = "Tensor hidden, Tensor? thought_hidden, Tensor? mixing_weight, Tensor? base_index"
_SOFTMAX = "float temperature, float? softcap, Tensor? suppress"
_cross_entropy_op = register_op(
    f"linear_cross_entropy({_HIDDEN}, Tensor weight, {_SOFTMAX}, Tensor target, Tensor? nll_scale,"
    " Tensor? entropy_scale, bool entropy, bool every_row, bool[4] needs, str backend)"
    " -> (Tensor nll, Tensor entropy, Tensor d_hidden, Tensor d_thought, Tensor d_mixing_weight, Tensor d_weight)",
    _cross_entropy,
    _cross_entropy_fake,
)


def _scaled_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient · factor as a new tensor, multiplied in the compute dtype.

    With a factor of as many dimensions as the gradient, PyTorch converts element by element. On a GPU this takes a
    single pass; on a CPU it uses temporary tensors, so the work is done in blocks.
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


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, backend: str, *, again: bool) -> Tensor:
    """Return gradient · factor, in the memory of the gradient unless it will be scaled ``again``.

    If the factor is 1, the gradient is returned unchanged; on a CPU this is checked here, on a GPU in the kernel.
    """
    if gradient.dtype == dtype and not torch.compiler.is_compiling():
        if gradient.device.type == "cpu":
            if factor == 1:
                return gradient
        elif not again:
            with torch.cuda.device_of(gradient):
                BACKENDS[backend].load().scale_(gradient, factor)
            return gradient
    return _scaled_gradient_op(gradient, factor, dtype)


def _graph_is_kept() -> bool:
    """Whether the running backward retains the graph, so that another may follow through it."""
    return torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()


def _peak(scales: Scales, temperature: float) -> Tensor:
    """The largest |scale| / temperature. Gradients of logits divided by it are of order 1, well within float16."""
    if scales.nll.shape[0] == 0:
        return scales.nll.new_ones(())
    peak = scales.nll.abs().amax()
    if scales.entropy is not None:
        peak = torch.maximum(peak, scales.entropy.abs().amax())
    peak = peak / temperature
    return torch.where(peak == 0, 1, peak)


def link_to(*inputs: Tensor | None) -> Tensor:
    """Create an empty tensor that depends on the inputs without storing them, for ``once_differentiable``."""
    return torch.cat([x[:0].flatten() for x in inputs if x is not None])


def _at_their_places(d_hidden, d_thought, d_mixing_weight, d_weight, d_nll_scale=None, d_entropy_scale=None) -> tuple:
    """Arrange gradients in the order of the op's arguments."""
    return (
        d_hidden,
        d_thought,
        d_mixing_weight,
        None,
        d_weight,
        *(None,) * 4,
        d_nll_scale,
        d_entropy_scale,
        *(None,) * 4,
    )


class ReducedCrossEntropy(torch.autograd.Function):
    """Σ scaled nll − Σ scaled entropy, together with nll and entropy: ``apply(*call.flat(), backend, link)``.

    The gradients are computed in the forward, with three matmuls in all. ``link`` is the result of ``link_to`` for the
    tensors that may need a gradient.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *arguments, backend, link = arguments
        call = Call.of(*arguments)
        needs_scale = ctx.needs_input_grad[9:11]
        scales, peak = call.scales, call.scales.nll.new_ones(())
        # 1 / rows could push gradients below the smallest float16; it is multiplied in with the incoming gradient.
        if call.weight.dtype == torch.float16:
            peak = _peak(scales, call.softmax.temperature)
        scaled = call._replace(
            scales=scales.each(lambda scale: scale / peak) if any(call.needs) else scales,
            every_row=call.every_row or any(needs_scale),
        )
        nll, entropy, *gradients = _cross_entropy_op(*scaled.flat(), backend)
        loss = weighted_sum(scales.nll, nll)
        if scales.entropy is not None:
            loss = loss - weighted_sum(scales.entropy, entropy)
        slopes = (
            counted(scales.nll, nll) if needs_scale[0] else None,
            -counted(scales.entropy, entropy) if needs_scale[1] else None,
        )
        ctx.save_for_backward(*gradients, peak, *slopes, link)
        ctx.needs, ctx.backend = call.needs, backend
        ctx.dtypes = [None if x is None else x.dtype for x in (*call.hidden[:3], call.weight)]
        ctx.mark_non_differentiable(nll, entropy)
        return loss, nll, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        *gradients, peak, nll, entropy, _ = ctx.saved_tensors
        factor, again = grad_loss * peak, _graph_is_kept()
        wanted = (
            _scaled(gradient, factor, dtype, ctx.backend, again=again) if needed else None
            for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs, strict=True)
        )
        return *_at_their_places(*wanted, *(None if x is None else grad_loss * x for x in (nll, entropy))), None


class RowCrossEntropy(torch.autograd.Function):
    """Per-row nll and entropy of a call without scales: ``apply(*call.flat(), backend)``.

    The backward recomputes the logits, with four matmuls in all.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *arguments, backend = arguments
        call = Call.of(*arguments)
        ctx.save_for_backward(*call.hidden, call.weight, call.softmax.suppress, call.target)
        ctx.options = call.softmax[:2], call.needs, backend
        nll, entropy, *_ = _cross_entropy_op(*call._replace(needs=[False] * 4).flat(), backend)
        ctx.mark_non_differentiable(entropy)
        return nll, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll, _):
        *hidden, weight, suppress, target = ctx.saved_tensors
        (temperature, softcap), needs, backend = ctx.options
        scales = Scales(grad_nll, None)
        peak = _peak(scales, temperature) if weight.dtype == torch.float16 else None
        if peak is not None:
            scales = Scales(grad_nll / peak, None)
        call = Call(
            Hidden(*hidden), weight, Softmax(temperature, softcap, suppress), target, scales,
            entropy=False, every_row=False, needs=needs,
        )  # fmt: skip
        _, _, *gradients = _cross_entropy_op(*call.flat(), backend)
        wanted = (
            None
            if not needed
            else gradient.to(x.dtype)
            if peak is None
            else _scaled(gradient, peak, x.dtype, backend, again=False)
            for gradient, x, needed in zip(gradients, (*hidden[:3], weight), needs, strict=True)
        )
        return _at_their_places(*wanted)
