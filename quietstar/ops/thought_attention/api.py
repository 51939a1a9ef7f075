"""The public function ``thought_attention``: checks its arguments, chooses a backend and calls it."""

from typing import Literal, overload

import torch
from torch import Tensor

from quietstar.ops._backend import request_behind, select_backend
from quietstar.ops._checks import (
    Dims,
    check_choice,
    check_floating,
    check_integer,
    check_range,
    check_same_device,
    check_same_dtype,
)
from quietstar.ops._precision import autocast_inputs, autocast_off, compute_dtype
from quietstar.ops.thought_attention import reference
from quietstar.ops.thought_attention.autograd import ThoughtAttention
from quietstar.ops.thought_attention.backends import BACKENDS, BACKWARDS
from quietstar.ops.thought_attention.inputs import Inputs, Mask


@overload
def thought_attention(
    query: Tensor, key: Tensor, value: Tensor, thought_key: Tensor, thought_value: Tensor, *,
    anchors: Tensor | None = ..., key_start: Tensor | None = ..., thought_lengths: Tensor | None = ...,
    causal: bool = ..., window: int | None = ..., window_from: Literal["anchor", "step"] = ...,
    scale: float | None = ..., softcap: float | None = ..., return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def thought_attention(
    query: Tensor, key: Tensor, value: Tensor, thought_key: Tensor, thought_value: Tensor, *,
    anchors: Tensor | None = ..., key_start: Tensor | None = ..., thought_lengths: Tensor | None = ...,
    causal: bool = ..., window: int | None = ..., window_from: Literal["anchor", "step"] = ...,
    scale: float | None = ..., softcap: float | None = ..., return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def thought_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thought_key: Tensor,
    thought_value: Tensor,
    *,
    anchors: Tensor | None = None,
    key_start: Tensor | None = None,
    thought_lengths: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    window_from: Literal["anchor", "step"] = "anchor",
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Compute attention of many thoughts over one shared base sequence (tokenwise-parallel, "diagonal" attention).

    Anchor p follows base position a = ``anchors[p]`` and has T extra tokens (steps). The query of step t sees the base
    keys j ≤ a and the thought keys 0..t of its own anchor, nothing else. One softmax runs over both sets of keys:

        output = softmax(scale · query · [key[j ≤ a]; thought_key[p, ≤ t]]ᵀ) · [value[j ≤ a]; thought_value[p, ≤ t]]

    This is the attention of Quiet-STaR's parallel thought generation (arXiv 2403.09629, section 4.2). With S = 1 and
    growing T it is also that of EAGLE-3's training-time test, and with ``causal=False``, where all steps of an anchor
    see each other, that of block drafting. Differentiable (once) in all five tensors.

    Elements that no query of a sequence sees may hold anything, including NaN: they change no result and get no
    gradient. These are base keys after the last anchor, before ``key_start`` or outside every window, and everything
    (incoming gradients included) of an inactive anchor or a step that does not exist. NaN in a key that some queries
    see may also reach other rows of that sequence.

    Args:
        query: [B, Hq, P, S, D], the last S of the T steps. Any strides. Every size except D and Dv may be 0.
        key: [B, Hkv, L, D], keys of the base sequence; Hq must be a multiple of Hkv.
        value: [B, Hkv, L, Dv]. Dv may differ from D.
        thought_key: [B, Hkv, P, T, D], T ≥ S. Any strides, so it may be the filled part of a preallocated cache.
        thought_value: [B, Hkv, P, T, Dv].
        anchors: int [P] or [B, P], values in [−1, L), in any order, with repeats. The default is ``arange(L)``, which
            requires P = L. −1 marks an inactive anchor (with L = 0 the only value): output 0, lse −inf, no gradient.
        key_start: int [B] or [B, P], values in [0, L]: the first visible base key, for left padding or for the start
            of an anchor's document in packed text. A value greater than the anchor hides all base keys. Default 0.
        thought_lengths: int [P] or [B, P], values in [0, T]: how many steps of each thought exist. Keys of later steps
            are not seen, their queries give output 0 and lse −inf, and neither gets a gradient. Default T.
        causal: if True, step t sees only steps ≤ t of its anchor; if False, all of them.
        window: sliding window in tokens, ≥ 1. Default: unlimited.
        window_from: the position that the window is measured from. "anchor": base key j is visible iff a − j < window,
            and thought keys always are. "step": the position of the query itself, a + 1 + t for step t. Then base key j
            is visible iff a + 1 + t − j < window, and step t' of the same thought iff t − t' < window. This is how
            models define their sliding window.
        scale: factor on the scores (kept in float32 or wider) before the softmax, of any sign. Default D^−½.
        softcap: c > 0: the scaled scores s become c · tanh(s / c), as in Gemma 2 (arXiv 2408.00118). Default: no cap.
        return_lse: if True, also return the log-sum-exp of the scores.
        backend: None, "auto", a name or a list such as "cuda,triton": see ``quietstar.ops``. "cuda" has no backward:
            its gradients are computed, from its output and lse, by the next backend in the list that can, otherwise
            by triton or torch.

    Returns:
        output [B, Hq, P, S, Dv] in the dtype of ``query``. With ``return_lse``, a tuple of it and the natural-log lse
        [B, Hq, P, S] in float32 (float64 for float64 inputs), which is differentiable too.

    Example:
        >>> query = torch.randn(1, 4, 16, 3, 8)  # 16 anchors, 3 steps each
        >>> key, value = torch.randn(2, 1, 2, 16, 8)
        >>> thought_key, thought_value = torch.randn(2, 1, 2, 16, 3, 8)
        >>> thought_attention(query, key, value, thought_key, thought_value).shape
        torch.Size([1, 4, 16, 3, 8])

    Raises:
        TypeError: an argument is not a tensor, a dtype is not floating point (for ``anchors``, ``key_start`` and
            ``thought_lengths``: not int32 or int64), dtypes differ, ``scale`` or ``softcap`` is not a number, or
            ``causal`` is not a bool.
        ValueError: shapes or devices disagree, Hq is not a multiple of Hkv, D or Dv is 0, T < S, ``window`` < 1,
            ``window_from`` is unknown, ``scale`` or ``softcap`` is not finite, ``softcap`` ≤ 0, or the backend is
            unknown or unavailable; also for values of ``anchors``, ``key_start`` or ``thought_lengths`` out of range
            (checked on the CPU only, unless ``QUIETSTAR_CHECK_VALUES`` is set: see ``quietstar.ops``).
    """
    dims = Dims()
    dims.bind("query", query, "B Hq P S D")
    dims.bind("key", key, "B Hkv L D")
    dims.bind("value", value, "B Hkv L Dv")
    dims.bind("thought_key", thought_key, "B Hkv P T D")
    dims.bind("thought_value", thought_value, "B Hkv P T Dv")
    if dims["D"] == 0:
        raise ValueError("query must have heads of at least D = 1 element, got D = 0")
    if dims["Dv"] == 0:
        raise ValueError("value must have heads of at least Dv = 1 element, got Dv = 0")
    if dims["Hq"] % dims["Hkv"] if dims["Hkv"] else dims["Hq"]:
        raise ValueError(f"query must have Hq a multiple of Hkv = {dims['Hkv']} heads of key, got Hq = {dims['Hq']}")
    if dims["T"] < dims["S"]:
        raise ValueError(
            f"thought_key must have T >= S = {dims['S']} steps (the queries are the last S of T), got T = {dims['T']}"
        )
    check_same_device(
        query=query, key=key, value=value, thought_key=thought_key, thought_value=thought_value,
        anchors=anchors, key_start=key_start, thought_lengths=thought_lengths,
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
    if thought_lengths is not None:
        check_integer("thought_lengths", thought_lengths)
        dims.bind("thought_lengths", thought_lengths, "P", "B P")
        check_range("thought_lengths", thought_lengths, 0, dims["T"])
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be None or an integer >= 1, got {window!r}")
    check_choice("window_from", window_from, ("anchor", "step"))
    scale = None if scale is None else _checked_number("scale", scale, query.dtype)
    if softcap is not None and _checked_number("softcap", softcap, query.dtype) <= 0:
        raise ValueError(f"softcap must be None or positive, got {softcap}")

    inputs = Inputs(query, key, value, thought_key, thought_value)
    mask = Mask.of(inputs, anchors, key_start, thought_lengths, window, window_from, causal, scale, softcap)
    shown = {"anchors": anchors, "key_start": key_start, "thought_lengths": thought_lengths}
    name = backward = select_backend("thought_attention", backend, BACKENDS, inputs, mask, **inputs._asdict(), **shown)
    if name == "reference":
        with autocast_off(query.device):
            output, lse = reference.forward(inputs, mask)
    else:
        if name not in BACKWARDS and torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            rest = request_behind(backend, name)
            backward = select_backend("thought_attention's backward", rest, BACKWARDS, inputs, mask)
        output, lse = ThoughtAttention.apply(*inputs, *mask, name, backward)
    return (output, lse) if return_lse else output


def _checked_number(name: str, value: float, dtype: torch.dtype) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be None or a number, got {type(value).__name__}")
    wide = compute_dtype(dtype)
    if not abs(value) <= torch.finfo(wide).max:  # nan neither
        raise ValueError(f"{name} must be finite in {wide}, got {value}")
    return float(value)
