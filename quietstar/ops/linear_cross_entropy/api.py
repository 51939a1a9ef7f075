"""The public functions: checks, choice of backend, dispatch."""

from collections.abc import Iterable

import torch
from torch import Tensor

from quietstar.ops._autocast import autocast_inputs
from quietstar.ops._backend import Backend, always_available, select_backend
from quietstar.ops._checks import (
    Dims,
    check_floating,
    check_integer,
    check_range,
    check_same_device,
    check_same_dtype,
)
from quietstar.ops._native import cpu_unavailable, cuda_unavailable
from quietstar.ops._precision import autocast_off
from quietstar.ops._triton import triton_unavailable
from quietstar.ops._vocabulary import (
    check_head,
    check_mixing_weight,
    check_reduction,
    checked_temperature,
    marked_target,
    row_scales,
    suppressed_ids,
    weighted_sum,
)
from quietstar.ops.linear_cross_entropy import reference
from quietstar.ops.linear_cross_entropy.autograd import ReducedCrossEntropy, RowCrossEntropy, link_to

_BACKENDS = {
    name: Backend(unavailable, lambda: None)
    for name, unavailable in {
        "triton": triton_unavailable,
        "cuda": cuda_unavailable,
        "cpu": cpu_unavailable,
        "torch": always_available,
        "reference": always_available,
    }.items()
}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    suppress: Iterable[int] | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    row_weight: Tensor | None = None,
    return_nll: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of the logits ``hidden @ weight.T / temperature``, which are never held for all rows.

        nll[r] = log Σ_v exp(z[r, v]) − z[r, target[r]],    z = hidden · weightᵀ / temperature, −∞ where suppressed

    For "mean" and "sum" the gradients are made in the forward, with the logits at hand: three matmuls in all. For
    "none" the backward computes the logits again: four. A gradient that nobody needs costs nothing; nor, on a CPU, does
    a row that is ignored or has ``row_weight`` 0. Differentiable (once) in hidden, weight and row_weight.

    Extra memory: the gradients, one chunk of logits (``quietstar.ops._rows.CHUNK_BYTES``), and d weight in float32.

    Args:
        hidden: [rows, H], floating point, H ≥ 1.
        weight: [V, H], in the dtype of ``hidden`` (inside autocast both take the autocast dtype).
        target: int [rows], token ids in [0, V) or ``ignore_index``.
        temperature: from 1e-30 to 1e30; divides the logits.
        suppress: token ids that get probability 0, as integers (a few; each is sent to a GPU by itself) or an int
            tensor [n] on the device of ``weight``.
        ignore_index: rows with this target have nll 0 and no gradient, whatever they hold.
        reduction: "mean" over the rows that are not ignored (0 if there are none), "sum", or "none".
        row_weight: [rows], floating point, only with "sum": the loss is sum(row_weight · nll). A row of weight 0 adds
            neither to the loss nor to a gradient, even if its nll is not finite.
        return_nll: also return the per-row nll, detached.
        backend: None, "auto", a name or a list such as "cuda,triton": see ``quietstar.ops``.

    Returns:
        The loss, a scalar, or [rows] for "none"; with ``return_nll`` a pair of it and the nll [rows]. In float32,
        float64 for float64 inputs.

    Raises:
        TypeError: an argument of the wrong type, or hidden and weight of different dtypes.
        ValueError: shapes or devices that disagree, a target or suppressed id out of range, a suppressed target,
            everything suppressed, a temperature out of range, H = 0, an unknown reduction, ``row_weight`` without
            "sum", an unknown or unavailable backend. Values of tensors are read on the CPU only; on CUDA, and when
            compiled, the nll of a row with a wrong target is NaN instead (``QUIETSTAR_CHECK_VALUES`` turns the checks
            on for CUDA too).
    """
    dims = Dims()
    dims.bind("hidden", hidden, "rows H")
    dims.bind("weight", weight, "V H")
    dims.bind("target", target, "rows")
    check_floating("hidden", hidden)
    check_same_device(hidden=hidden, weight=weight, target=target)
    hidden, weight = autocast_inputs(hidden, weight)
    check_same_dtype(hidden=hidden, weight=weight)
    return _cross_entropy(
        "linear_cross_entropy", hidden, None, None, weight, target, None,
        temperature=checked_temperature(temperature, zero=False),
        suppress=suppressed_ids(suppress, dims["V"], weight.device),
        ignore_index=ignore_index, reduction=reduction, row_weight=row_weight, return_nll=return_nll, backend=backend,
    )  # fmt: skip


def mixed_linear_cross_entropy(
    base_hidden: Tensor,
    thought_hidden: Tensor,
    mixing_weight: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    base_index: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    row_weight: Tensor | None = None,
    return_nll: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of the prediction mixed from hidden states without and with a thought.

    Row r of the head's input is (1 − w[r]) · base_hidden[base_index[r]] + w[r] · thought_hidden[r]. The head being
    linear, this interpolates the logits, and the log-probabilities up to normalisation (Quiet-STaR, arXiv 2403.09629,
    section 4.3). Cost and memory are those of :func:`linear_cross_entropy`. Differentiable (once) in base_hidden,
    thought_hidden, mixing_weight, weight and row_weight.

    Args:
        base_hidden: [base rows, H], floating point; without ``base_index`` [rows, H].
        thought_hidden: [rows, H], in the dtype of ``base_hidden``.
        mixing_weight: [rows], weight w of the thought, unbounded; in the dtype of ``base_hidden`` or float32.
        weight: [V, H], in the dtype of ``base_hidden`` (inside autocast all three take the autocast dtype).
        target: int [rows], token ids in [0, V) or ``ignore_index``.
        base_index: int [rows], values in [0, base rows), in any order, with repeats. Default: row r mixes with row r.
        ignore_index, reduction, row_weight, return_nll, backend: as in :func:`linear_cross_entropy`.

    Returns:
        As :func:`linear_cross_entropy`.

    Raises:
        TypeError, ValueError: as :func:`linear_cross_entropy`; also for ``base_index`` out of range.
    """
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
        "mixed_linear_cross_entropy", base_hidden, thought_hidden, mixing_weight, weight, target, base_index,
        temperature=1.0, suppress=None,
        ignore_index=ignore_index, reduction=reduction, row_weight=row_weight, return_nll=return_nll, backend=backend,
    )  # fmt: skip


def _cross_entropy(
    op: str,
    hidden: Tensor,
    thought_hidden: Tensor | None,
    mixing_weight: Tensor | None,
    weight: Tensor,
    target: Tensor,
    base_index: Tensor | None,
    *,
    temperature: float,
    suppress: Tensor | None,
    ignore_index: int,
    reduction: str,
    row_weight: Tensor | None,
    return_nll: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What both functions share, from the checks of the rows on."""
    check_integer("target", target)
    check_reduction(reduction, ignore_index, row_weight, target)
    check_head(*weight.shape, "hidden" if thought_hidden is None else "base_hidden")
    target = marked_target(target, weight.shape[0], ignore_index, suppress)
    scale = None if reduction == "none" else row_scales(target, reduction, row_weight, weight.dtype)
    name = select_backend(op, backend, _BACKENDS, hidden)

    if name == "reference":
        with autocast_off(weight.device):
            nll = _reference_nll(
                hidden, thought_hidden, mixing_weight, weight, target, base_index, suppress, temperature, row_weight
            )
        loss = nll if scale is None else weighted_sum(scale, nll)
    else:
        needs = [torch.is_grad_enabled() and x is not None and x.requires_grad
                 for x in (hidden, thought_hidden, mixing_weight, weight, scale)]  # fmt: skip
        if scale is None:
            loss = nll = RowCrossEntropy.apply(
                hidden, thought_hidden, mixing_weight, weight, target, base_index, suppress,
                temperature, needs[:4], name,
            )  # fmt: skip
        else:
            loss, nll = ReducedCrossEntropy.apply(
                hidden, thought_hidden, mixing_weight, weight, scale,
                link_to(hidden, thought_hidden, mixing_weight, weight, scale), target, base_index, suppress,
                temperature, return_nll, needs, name,
            )  # fmt: skip
    return (loss, nll.detach()) if return_nll else loss


def _reference_nll(
    hidden: Tensor,
    thought_hidden: Tensor | None,
    mixing_weight: Tensor | None,
    weight: Tensor,
    target: Tensor,
    base_index: Tensor | None,
    suppress: Tensor | None,
    temperature: float,
    row_weight: Tensor | None,
) -> Tensor:
    """Per-row nll by the specification; of rows that do not count, no gradient."""

    def nll(absent: Tensor) -> Tensor:
        rows = hidden
        if thought_hidden is not None:
            rows = reference.mixed_hidden(hidden, thought_hidden, mixing_weight.masked_fill(absent, 0), base_index)
        return reference.row_nll(rows, weight, target, suppress, temperature, absent)

    ignored = target < 0
    if row_weight is None:
        return nll(ignored)
    weightless = row_weight == 0
    with torch.no_grad():
        every = nll(ignored)
    return torch.where(weightless, every, nll(ignored | weightless))
