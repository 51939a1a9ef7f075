"""The public function: checks, choice of backend, dispatch."""

import torch
from torch import Tensor

from quietstar.ops._autocast import autocast_inputs
from quietstar.ops._backend import Availability, always_available, select_backend
from quietstar.ops._checks import (
    Dims,
    check_floating,
    check_integer,
    check_range,
    check_same_device,
    check_same_dtype,
)
from quietstar.ops._native import cpu_unavailable, cuda_unavailable
from quietstar.ops._precision import autocast_off, compute_dtype
from quietstar.ops._triton import triton_unavailable
from quietstar.ops.thought_attention import reference
from quietstar.ops.thought_attention.autograd import ThoughtAttention

_LARGEST_HEAD = {"triton": 256, "cuda": 128}


def _triton_unavailable(query: Tensor, needs_gradient: bool) -> str | None:
    return _head_too_large("triton", query) or triton_unavailable(query)


def _cuda_unavailable(query: Tensor, needs_gradient: bool) -> str | None:
    if needs_gradient:
        return "its kernels have no backward, and an input needs a gradient (torch.no_grad() switches gradients off)"
    return _head_too_large("cuda", query) or cuda_unavailable(query)


def _cpu_unavailable(query: Tensor, needs_gradient: bool) -> str | None:
    return cpu_unavailable(query)


def _head_too_large(backend: str, query: Tensor) -> str | None:
    if query.shape[-1] <= _LARGEST_HEAD[backend]:
        return None
    return f"its kernels take heads of at most {_LARGEST_HEAD[backend]} elements, got D = {query.shape[-1]}"


_BACKENDS: dict[str, Availability] = {
    "triton": _triton_unavailable,
    "cuda": _cuda_unavailable,
    "cpu": _cpu_unavailable,
    "torch": always_available,
    "reference": always_available,
}


def thought_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thought_key: Tensor,
    thought_value: Tensor,
    *,
    anchors: Tensor | None = None,
    key_start: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention of many thoughts over one shared base sequence (tokenwise-parallel, "diagonal" attention).

    Anchor p sits behind base position a = ``anchors[p]`` and has T extra tokens (steps). The query of step t sees the
    base keys j ≤ a and its own anchor's thought keys 0..t, nothing else; the softmax runs over both sets together:

        output = softmax(scale · query · [key[j ≤ a]; thought_key[p, ≤ t]]ᵀ) · [value[j ≤ a]; thought_value[p, ≤ t]]

    This is the attention of Quiet-STaR's parallel thought generation (arXiv 2403.09629, section 4.2); with S = 1 and
    growing T it is also that of EAGLE-3's training-time test. Differentiable (once) in all five tensors.

    What no row of a sequence sees (base keys behind its last anchor, in front of ``key_start``, outside of all windows;
    everything of an inactive anchor, incoming gradients included) may hold anything, NaN too: it changes no result and
    gets no gradient. NaN in a key that some rows see may reach other rows of that sequence.

    Args:
        query: [B, Hq, P, S, D], the last S of the T steps. Any strides. Every size but D may be 0.
        key, value: [B, Hkv, L, D], the base sequence; Hq is a multiple of Hkv.
        thought_key, thought_value: [B, Hkv, P, T, D], T ≥ S.
        anchors: int [P] or [B, P], values in [−1, L); default ``arange(L)``, then P must be L. Any order, repeats
            allowed. −1 is an inactive anchor, and with L = 0 the only one: output 0, lse −inf, no gradient.
        key_start: int [B] or [B, P], values in [0, L]: first visible base key (left padding; where an anchor's document
            starts in packed text). One behind the anchor hides all base keys from it. Default 0.
        window: sliding window in tokens, ≥ 1: base key j is visible iff a − j < window. Default unlimited.
        scale: factor on the scores (kept in float32 or wider) before the softmax, of any sign. Default D^−½.
        return_lse: also return the log-sum-exp of the scaled scores.
        backend: None, "auto", a name or a list such as "cuda,triton": see ``quietstar.ops``.

    Returns:
        output [B, Hq, P, S, D] in the dtype of ``query``; with ``return_lse`` also the natural-log lse
        [B, Hq, P, S] in float32 (float64 for float64), differentiable too.

    Raises:
        TypeError: not a tensor, a dtype that is not floating (anchors and key_start: not int32/int64), mixed dtypes, or
            a scale that is not a number.
        ValueError: shapes or devices that disagree, Hq not a multiple of Hkv, D = 0, T < S, values of ``anchors`` or
            ``key_start`` out of range (read on the CPU only: on CUDA the check would wait for the device, see
            ``QUIETSTAR_CHECK_VALUES`` in ``quietstar.ops``), window < 1, a scale that is not finite, an unknown or
            unavailable backend.
    """
    dims = Dims()
    dims.bind("query", query, "B Hq P S D")
    dims.bind("key", key, "B Hkv L D")
    dims.bind("value", value, "B Hkv L D")
    dims.bind("thought_key", thought_key, "B Hkv P T D")
    dims.bind("thought_value", thought_value, "B Hkv P T D")
    if dims["D"] == 0:
        raise ValueError("query must have heads of at least D = 1 element, got D = 0")
    if dims["Hq"] % dims["Hkv"] if dims["Hkv"] else dims["Hq"]:
        raise ValueError(f"query must have Hq a multiple of Hkv = {dims['Hkv']} heads of key, got Hq = {dims['Hq']}")
    if dims["T"] < dims["S"]:
        raise ValueError(
            f"thought_key must have T >= S = {dims['S']} steps (the queries are the last S of T), got T = {dims['T']}"
        )
    check_same_device(
        query=query, key=key, value=value, thought_key=thought_key, thought_value=thought_value,
        anchors=anchors, key_start=key_start,
    )  # fmt: skip
    check_floating("query", query)
    query, key, value, thought_key, thought_value = autocast_inputs(query, key, value, thought_key, thought_value)
    check_same_dtype(query=query, key=key, value=value, thought_key=thought_key, thought_value=thought_value)

    if anchors is None:
        if dims["P"] != dims["L"]:
            raise ValueError(
                f"anchors must be given unless every base position has one (P = L), got P = {dims['P']}, "
                f"L = {dims['L']}"
            )
    else:
        check_integer("anchors", anchors)
        dims.bind("anchors", anchors, "P", "B P")
        check_range("anchors", anchors, -1, dims["L"] - 1)
    if key_start is not None:
        check_integer("key_start", key_start)
        dims.bind("key_start", key_start, "B", "B P")
        check_range("key_start", key_start, 0, dims["L"])
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be None or an integer >= 1, got {window!r}")
    scale = dims["D"] ** -0.5 if scale is None else _checked_scale(scale, query.dtype)

    inputs = query, key, value, thought_key, thought_value
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    name = select_backend("thought_attention", backend, _BACKENDS, query, needs_gradient)
    if name == "reference":
        if anchors is None:
            anchors = torch.arange(dims["L"], device=query.device)
        if key_start is None:
            key_start = torch.zeros(dims["B"], dtype=torch.int64, device=query.device)
        with autocast_off(query.device):
            output, lse = reference.thought_attention(
                query, key, value, thought_key, thought_value, anchors.expand(dims["B"], -1), key_start, window, scale
            )
    else:
        output, lse = ThoughtAttention.apply(
            query, key, value, thought_key, thought_value, anchors, key_start, window, scale, name
        )
    return (output, lse) if return_lse else output


def _checked_scale(scale: float, dtype: torch.dtype) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be None or a number, got {type(scale).__name__}")
    wide = compute_dtype(dtype)
    if not abs(scale) <= torch.finfo(wide).max:  # nan neither
        raise ValueError(f"scale must be finite in {wide}, got {scale}")
    return float(scale)
