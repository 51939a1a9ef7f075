"""The public linear cross-entropies: they check their arguments, choose a backend and call it."""

from collections.abc import Iterable
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from quietstar.ops._backend import select_backend
from quietstar.ops._checks import (
    Dims,
    check_floating,
    check_integer,
    check_range,
    check_same_device,
    check_same_dtype,
)
from quietstar.ops._dtensor import gathered
from quietstar.ops._precision import autocast_inputs, autocast_off
from quietstar.ops._vocabulary import (
    Softmax,
    check_head,
    check_mixing_weight,
    check_reduction,
    checked_entropy_weight,
    checked_softcap,
    checked_temperature,
    marked_target,
    row_scales,
    suppressed_ids,
    weighted_sum,
)
from quietstar.ops.linear_cross_entropy import reference
from quietstar.ops.linear_cross_entropy.autograd import ReducedCrossEntropy, RowCrossEntropy, link_to
from quietstar.ops.linear_cross_entropy.backends import BACKENDS
from quietstar.ops.linear_cross_entropy.inputs import Call, Hidden, Scales

TokenIds = Iterable[int] | Tensor | None


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, temperature: float = ..., suppress: TokenIds = ...,
    softcap: float | None = ..., ignore_index: int = ..., reduction: str = ..., row_weight: Tensor | None = ...,
    entropy_weight: float | Tensor | None = ..., return_nll: Literal[False] = False,
    return_entropy: Literal[False] = False, backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, temperature: float = ..., suppress: TokenIds = ...,
    softcap: float | None = ..., ignore_index: int = ..., reduction: str = ..., row_weight: Tensor | None = ...,
    entropy_weight: float | Tensor | None = ..., return_nll: Literal[True],
    return_entropy: Literal[False] = False, backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, temperature: float = ..., suppress: TokenIds = ...,
    softcap: float | None = ..., ignore_index: int = ..., reduction: str = ..., row_weight: Tensor | None = ...,
    entropy_weight: float | Tensor | None = ..., return_nll: Literal[False] = False,
    return_entropy: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, temperature: float = ..., suppress: TokenIds = ...,
    softcap: float | None = ..., ignore_index: int = ..., reduction: str = ..., row_weight: Tensor | None = ...,
    entropy_weight: float | Tensor | None = ..., return_nll: Literal[True],
    return_entropy: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    suppress: TokenIds = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    row_weight: Tensor | None = None,
    entropy_weight: float | Tensor | None = None,
    return_nll: bool = False,
    return_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Compute the cross-entropy of ``hidden @ weight.T / temperature`` without storing the logits of all rows.

        nll[r] = log Σ_v exp(z[r, v]) − z[r, target[r]],    z = hidden · weightᵀ / temperature, −∞ where suppressed
        entropy[r] = log Σ_v exp(z[r, v]) − Σ_v p[r, v] · z[r, v],    p = softmax(z)

    For "mean" and "sum", gradients are computed in the forward while the logits are at hand, with three matmuls in all.
    For "none", the backward recomputes the logits, which makes four. Gradients that are not needed cost nothing, and
    neither do, on a CPU, rows that are ignored or have weight 0. The entropy needs no further pass over the logits.
    Differentiable (once) in hidden, weight, row_weight and entropy_weight.

    Extra memory: the gradients, one chunk of logits (``quietstar.ops._rows.CHUNK_BYTES``), and d weight in float32.

    Args:
        hidden: [rows, H], floating point, H ≥ 1.
        weight: [V, H], in the dtype of ``hidden`` (inside autocast both are cast to the autocast dtype). A DTensor,
            sharded by FSDP or replicated, is gathered for the call. Its gradient is the mean over processes.
        target: int [rows], token ids in [0, V) or ``ignore_index``.
        temperature: divisor of the logits, from 1e-30 to 1e30.
        suppress: token ids that get probability 0: an int tensor [n] on the device of ``weight``, or integers (only a
            few: on a GPU each is sent separately).
        softcap: c from 1e-30 to 1e30: logits become c · tanh(logits / c) before they are divided by the temperature
            (Gemma 2, arXiv 2408.00118); infinite ones stay as they are. Default: no cap.
        ignore_index: rows with this target have nll and entropy 0 and no gradient, whatever they hold.
        reduction: "mean" over the rows that are not ignored (0 if there are none), "sum", or "none".
        row_weight: [rows], floating point, only with "sum": the loss is sum(row_weight · nll). A row of weight 0 adds
            neither to the loss nor to a gradient, even if its nll is not finite.
        entropy_weight: a number, or [rows], floating point, only with "sum", with or without row_weight:
            sum(entropy_weight · entropy) is subtracted from the loss. A row of weight 0 contributes nothing.
        return_nll: if True, also return the per-row nll, detached.
        return_entropy: if True, also return the per-row entropy of softmax(z), in nats, detached.
        backend: None, "auto", a name or a list such as "cuda,triton": see ``quietstar.ops``.

    Returns:
        The loss, a scalar, or [rows] for "none"; with ``return_nll`` or ``return_entropy``, a tuple of the loss
        followed by the nll [rows] and the entropy [rows], as requested. In float32 (float64 for float64 inputs).

    Example:
        >>> linear_cross_entropy(torch.zeros(3, 4), torch.zeros(2, 4), torch.tensor([0, 1, -100]))
        tensor(0.6931)

    Raises:
        TypeError: an argument has the wrong type, or ``hidden`` and ``weight`` have different dtypes.
        ValueError: shapes or devices disagree, a target or suppressed id is out of range, a target is suppressed, every
            token is suppressed, ``temperature`` or ``softcap`` is out of range, H = 0, the reduction is unknown,
            ``row_weight`` or ``entropy_weight`` is given without "sum", ``entropy_weight`` is not finite, or the
            backend is unknown or unavailable. Values of tensors are checked on the CPU only; on CUDA, and inside
            ``torch.compile``, nll and entropy of a row with an invalid target are NaN instead
            (``QUIETSTAR_CHECK_VALUES`` turns the checks on for CUDA too).
    """
    weight = gathered("weight", weight)
    dims = Dims()
    dims.bind("hidden", hidden, "rows H")
    dims.bind("weight", weight, "V H")
    dims.bind("target", target, "rows")
    check_floating("hidden", hidden)
    check_same_device(hidden=hidden, weight=weight, target=target)
    hidden, weight = autocast_inputs(hidden, weight)
    check_same_dtype(hidden=hidden, weight=weight)
    softmax = Softmax(
        checked_temperature(temperature, zero=False), checked_softcap(softcap),
        suppressed_ids(suppress, dims["V"], weight.device),
    )  # fmt: skip
    reduce = _Reduction(reduction, ignore_index, row_weight, entropy_weight, return_nll, return_entropy)
    return _cross_entropy(
        "linear_cross_entropy", Hidden(hidden, None, None, None), weight, softmax, target, reduce, backend
    )


@overload
def mixed_linear_cross_entropy(
    base_hidden: Tensor, thought_hidden: Tensor, mixing_weight: Tensor, weight: Tensor, target: Tensor, *,
    base_index: Tensor | None = ..., temperature: float = ..., softcap: float | None = ..., ignore_index: int = ...,
    reduction: str = ..., row_weight: Tensor | None = ..., return_nll: Literal[False] = False,
    backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def mixed_linear_cross_entropy(
    base_hidden: Tensor, thought_hidden: Tensor, mixing_weight: Tensor, weight: Tensor, target: Tensor, *,
    base_index: Tensor | None = ..., temperature: float = ..., softcap: float | None = ..., ignore_index: int = ...,
    reduction: str = ..., row_weight: Tensor | None = ..., return_nll: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def mixed_linear_cross_entropy(
    base_hidden: Tensor,
    thought_hidden: Tensor,
    mixing_weight: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    base_index: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    row_weight: Tensor | None = None,
    return_nll: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the cross-entropy of a linear head on a mix of the hidden states without and with a thought.

    Row r of the head's input is (1 − w[r]) · base_hidden[base_index[r]] + w[r] · thought_hidden[r]. Since the head is
    linear, this interpolates the logits and, up to normalisation, the log-probabilities (Quiet-STaR, arXiv 2403.09629,
    section 4.3). Cost and memory are those of ``linear_cross_entropy``. Differentiable (once) in base_hidden,
    thought_hidden, mixing_weight, weight and row_weight.

    Args:
        base_hidden: [base rows, H], floating point; [rows, H] without ``base_index``.
        thought_hidden: [rows, H], in the dtype of ``base_hidden``.
        mixing_weight: [rows], weight w of the thought, unbounded; in the dtype of ``base_hidden`` or float32.
        weight: [V, H], in the dtype of ``base_hidden`` (inside autocast all three are cast to the autocast dtype).
        target: int [rows], token ids in [0, V) or ``ignore_index``.
        base_index: int [rows], values in [0, base rows), in any order, with repeats: the base row that each row mixes
            with. Default: row r mixes with base row r.
        temperature: see ``linear_cross_entropy``, also for the following arguments.
        softcap: likewise.
        ignore_index: likewise.
        reduction: likewise.
        row_weight: likewise.
        return_nll: likewise.
        backend: likewise.

    Returns:
        See ``linear_cross_entropy``.

    Example:
        >>> hidden = torch.eye(2)
        >>> mixed_linear_cross_entropy(hidden, hidden.flip(0), torch.tensor([0.5, 0.5]), hidden, torch.tensor([0, 1]))
        tensor(0.6931)

    Raises:
        TypeError, ValueError: as in ``linear_cross_entropy``; also if a value of ``base_index`` is out of range.
    """
    weight = gathered("weight", weight)
    dims = Dims()
    dims.bind("thought_hidden", thought_hidden, "rows H")
    dims.bind("base_hidden", base_hidden, "rows H" if base_index is None else "base_rows H")
    dims.bind("mixing_weight", mixing_weight, "rows")
    dims.bind("weight", weight, "V H")
    dims.bind("target", target, "rows")
    check_floating("base_hidden", base_hidden)
    check_same_device(
        base_hidden=base_hidden, thought_hidden=thought_hidden, mixing_weight=mixing_weight, weight=weight,
        target=target, base_index=base_index,
    )  # fmt: skip
    base_hidden, thought_hidden, weight = autocast_inputs(base_hidden, thought_hidden, weight)
    check_same_dtype(base_hidden=base_hidden, thought_hidden=thought_hidden, weight=weight)
    check_mixing_weight(mixing_weight, "base_hidden", base_hidden.dtype)
    if base_index is not None:
        dims.bind("base_index", base_index, "rows")
        check_integer("base_index", base_index)
        check_range("base_index", base_index, 0, dims["base_rows"] - 1)
    return _cross_entropy(
        "mixed_linear_cross_entropy", Hidden(base_hidden, thought_hidden, mixing_weight, base_index), weight,
        Softmax(checked_temperature(temperature, zero=False), checked_softcap(softcap), None), target,
        _Reduction(reduction, ignore_index, row_weight, None, return_nll, False), backend,
    )  # fmt: skip


class _Reduction(NamedTuple):
    """Those arguments of the public functions that determine what is returned."""

    reduction: str
    ignore_index: int
    row_weight: Tensor | None
    entropy_weight: float | Tensor | None
    return_nll: bool
    return_entropy: bool


def _cross_entropy(
    op: str,
    hidden: Hidden,
    weight: Tensor,
    softmax: Softmax,
    target: Tensor,
    reduce: _Reduction,
    backend: str | None,
) -> Tensor | tuple[Tensor, ...]:
    """The part that both functions share: it checks the per-row arguments and runs the op."""
    check_integer("target", target)
    check_reduction(reduce.reduction, reduce.ignore_index, reduce.row_weight, target)
    entropy_weight = checked_entropy_weight(reduce.entropy_weight, reduce.reduction, target, weight.dtype)
    check_head(*weight.shape, "hidden" if hidden.thought is None else "base_hidden")
    target = marked_target(target, weight.shape[0], reduce.ignore_index, softmax.suppress)
    scales = entropy_scale = None
    if entropy_weight is not None:
        entropy_scale = row_scales(target, "sum", entropy_weight, weight.dtype)
    if reduce.reduction != "none":
        scales = Scales(row_scales(target, reduce.reduction, reduce.row_weight, weight.dtype), entropy_scale)
    leaves = *hidden[:3], weight, *(scales or ())
    call = Call(
        hidden, weight, softmax, target, scales,
        entropy=reduce.return_entropy or entropy_weight is not None,
        every_row=scales is None or reduce.return_nll or reduce.return_entropy,
        needs=[torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves[:4]],
    )  # fmt: skip
    name = select_backend(op, backend, BACKENDS, hidden.hidden, hidden=hidden.hidden, weight=weight)

    if name == "reference":
        with autocast_off(weight.device):
            nll, entropy = reference.counted_nll_and_entropy(call)
        loss = nll if scales is None else weighted_sum(scales.nll, nll)
        if entropy_scale is not None:
            loss = loss - weighted_sum(entropy_scale, entropy)
    elif scales is None:
        loss, entropy = RowCrossEntropy.apply(*call.flat(), name)
        nll = loss
    else:
        loss, nll, entropy = ReducedCrossEntropy.apply(*call.flat(), name, link_to(*leaves))
    extra = *((nll,) if reduce.return_nll else ()), *((entropy,) if reduce.return_entropy else ())
    return (loss, *(x.detach() for x in extra)) if extra else loss
