"""The public functions of mixing: they check their arguments, choose a backend and call it."""

from torch import Tensor

from quietstar.ops._backend import select_backend
from quietstar.ops._checks import check_floating, check_integer, check_same_device, check_same_dtype, check_tensor
from quietstar.ops._precision import autocast_off
from quietstar.ops._vocabulary import (
    check_mixing_weight,
    check_reduction,
    mark_rows,
    marked_target,
    row_scales,
    weighted_sum,
)
from quietstar.ops.mixing import reference
from quietstar.ops.mixing.autograd import MixedCrossEntropy, MixLogits
from quietstar.ops.mixing.backends import BACKENDS


def mix_logits(
    base_logits: Tensor, thought_logits: Tensor, mixing_weight: Tensor, *, backend: str | None = None
) -> Tensor:
    """Interpolate two predictions: (1 − w) · base_logits + w · thought_logits.

    Up to normalisation, this interpolates the log-probabilities (Quiet-STaR, arXiv 2403.09629, section 4.3). It is
    computed in float32 or wider. Differentiable (once) in all three tensors.

    A logit of −∞ marks a token as impossible. If it is −∞ in both predictions, so it is in the mix, whatever the
    (finite) weight. If it is −∞ in one, that −∞ is multiplied by its weight; if the weight is exactly 0, the mix is the
    other prediction. Infinities do not contribute to the gradient of the weight.

    Args:
        base_logits: [..., V], floating point, any strides.
        thought_logits: [..., V], shape and dtype of ``base_logits``.
        mixing_weight: [...], weight w of the thought, unbounded; in the dtype of the logits or float32.
        backend: None, "auto", a name or a list such as "cuda,triton": see ``quietstar.ops``.

    Returns:
        [..., V] in the dtype of the logits.

    Example:
        >>> mix_logits(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0.25]))
        tensor([[0.2500, 0.2500]])

    Raises:
        TypeError: an argument is not a tensor or not floating point, or dtypes disagree.
        ValueError: shapes or devices disagree, or the backend is unknown or unavailable.
    """
    _check_logits(base_logits, thought_logits, mixing_weight)
    name = select_backend("mix_logits", backend, BACKENDS, base_logits, base_logits=base_logits)
    if name == "reference":
        with autocast_off(base_logits.device):
            return reference.mixed(base_logits, thought_logits, mixing_weight).to(base_logits.dtype)
    return MixLogits.apply(base_logits, thought_logits, mixing_weight, name)


def mixed_cross_entropy(
    base_logits: Tensor,
    thought_logits: Tensor,
    mixing_weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Compute the cross-entropy of ``mix_logits(base_logits, thought_logits, mixing_weight)`` without storing the mix.

        nll = log Σ_v exp(z_v) − z_target,    z = (1 − w) · b + w · t
        d nll / d w = E[t − b] − (t − b)_target,    the expectation under softmax(z)

    Extra memory: the gradients and a few numbers per row. Differentiable (once) in both logits and the weight.

    A token whose mixed logit is −∞ has probability 0 and no gradient; if it is the target, the nll is infinite. The nll
    of a row is NaN if its mix contains NaN or +∞, or only −∞.

    Args:
        base_logits: [..., V], floating point, any strides.
        thought_logits: [..., V], shape and dtype of ``base_logits``.
        mixing_weight: [...], weight w of the thought, unbounded; in the dtype of the logits or float32.
        target: int [...], token ids in [0, V) or ``ignore_index``.
        ignore_index: rows with this target have nll 0 and no gradient, whatever they hold.
        reduction: "mean" over the rows that are not ignored (0 if there are none), "sum", or "none".
        backend: None, "auto", a name or a list such as "cuda,triton": see ``quietstar.ops``.

    Returns:
        The loss, a scalar, or [...] for "none"; in float32 (float64 for float64 logits).

    Example:
        >>> mixed_cross_entropy(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1), torch.tensor([0]))
        tensor(0.6931)

    Raises:
        TypeError: an argument is not a tensor, or dtypes disagree or are not those listed above.
        ValueError: shapes or devices disagree, a target is out of range (checked on the CPU only; on CUDA, and inside
            ``torch.compile``, its nll is NaN instead, see ``QUIETSTAR_CHECK_VALUES``), the reduction is unknown, or the
            backend is unknown or unavailable.
    """
    _check_logits(base_logits, thought_logits, mixing_weight)
    check_tensor("target", target)
    check_integer("target", target)
    check_same_device(base_logits=base_logits, target=target)
    if target.shape != mixing_weight.shape:
        raise ValueError(
            f"target must have the shape of mixing_weight, {list(mixing_weight.shape)}, got {list(target.shape)}"
        )
    check_reduction(reduction, ignore_index, None, target)
    target = marked_target(target, base_logits.shape[-1], ignore_index)
    # Rows without a target have an incoming gradient of 0, but 0 times a weight of NaN would be NaN.
    mixing_weight = mixing_weight.masked_fill(target < 0, 0)
    name = select_backend("mixed_cross_entropy", backend, BACKENDS, base_logits, base_logits=base_logits)
    if name == "reference":
        with autocast_off(base_logits.device):
            nll = reference.mixed_nll(base_logits, thought_logits, mixing_weight, target)
    else:
        nll = MixedCrossEntropy.apply(base_logits, thought_logits, mixing_weight, target.clamp_min(0), name)
        nll = mark_rows(nll, target)
    return nll if reduction == "none" else weighted_sum(row_scales(target, reduction, None, nll.dtype), nll)


def _check_logits(base_logits: Tensor, thought_logits: Tensor, mixing_weight: Tensor) -> None:
    for name, tensor in (
        ("base_logits", base_logits), ("thought_logits", thought_logits), ("mixing_weight", mixing_weight),
    ):  # fmt: skip
        check_tensor(name, tensor)
    check_floating("base_logits", base_logits)
    if base_logits.dim() == 0 or base_logits.shape[-1] == 0:
        raise ValueError(f"base_logits must have shape [..., V] with V >= 1, got {list(base_logits.shape)}")
    if thought_logits.shape != base_logits.shape:
        raise ValueError(
            f"thought_logits must have the shape of base_logits, {list(base_logits.shape)}, "
            f"got {list(thought_logits.shape)}"
        )
    if mixing_weight.shape != base_logits.shape[:-1]:
        raise ValueError(
            f"mixing_weight must have the leading shape of base_logits, {list(base_logits.shape[:-1])}, "
            f"got {list(mixing_weight.shape)}"
        )
    check_same_device(base_logits=base_logits, thought_logits=thought_logits, mixing_weight=mixing_weight)
    check_same_dtype(base_logits=base_logits, thought_logits=thought_logits)
    check_mixing_weight(mixing_weight, "base_logits", base_logits.dtype)
