"""The public function: checks, choice of backend, dispatch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quietstar.ops._autocast import autocast_inputs
from quietstar.ops._backend import Availability, always_available, select_backend
from quietstar.ops._checks import Dims, check_floating, check_same_device, check_same_dtype
from quietstar.ops._native import cpu_unavailable, cuda_unavailable
from quietstar.ops._precision import autocast_off
from quietstar.ops._triton import triton_unavailable
from quietstar.ops._vocabulary import suppressed_ids
from quietstar.ops.linear_sample import reference
from quietstar.ops.linear_sample.registration import linear_sample_op

_BACKENDS: dict[str, Availability] = {
    "triton": triton_unavailable,
    "cuda": cuda_unavailable,
    "cpu": cpu_unavailable,
    "torch": always_available,
    "reference": always_available,
}


@torch.no_grad()
def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    temperature: float = 1.0,
    suppress: Sequence[int] | Tensor | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Tensor,
    backend: str | None = None,
) -> Tensor:
    """Draw one token per row from softmax(hidden @ weight.T / temperature), without ever holding all the logits.

    Gumbel-max: the token with the largest sum of logit and noise wins. The noise is a function of seed, row number and
    token id alone (``quietstar.ops.linear_sample.noise``), so neither chunks nor backend change the tokens, except
    where two tokens tie to within the rounding of their logits. No gradient.

    Args:
        hidden: [rows, H], floating point.
        weight: [V, H], in the dtype of ``hidden`` (inside autocast both take the autocast dtype).
        temperature: ≥ 0; divides the logits. 0 is greedy: the largest logit, the lowest id on ties.
        suppress: token ids never to draw, as integers (a few; each is sent to a GPU by itself) or an int tensor [n] on
            the device of ``weight``.
        top_k: ≥ 1, draw only from the k likeliest tokens, and those as likely as the k-th.
        top_p: in (0, 1], draw only from the smallest set of likeliest tokens that together have at least this
            probability (at this temperature, after ``top_k``), and those as likely as the last of them.
        seed: integer of 64 bits, or an int64 scalar tensor. On the device of ``weight`` it is not read on the host: a
            captured CUDA graph draws anew after ``seed.add_(1)``.
        backend: None, "auto", a name or a list such as "cuda,triton": see ``quietstar.ops``.

    Returns:
        Token ids, int64 [rows].

    Raises:
        TypeError: an argument of the wrong type, or hidden and weight of different dtypes.
        ValueError: shapes or devices that disagree, temperature < 0, top_k < 1, top_p outside (0, 1], a suppressed id
            out of range, everything suppressed, a seed beyond 64 bits, an unknown or unavailable backend.
    """
    dims = Dims()
    dims.bind("hidden", hidden, "rows H")
    dims.bind("weight", weight, "V H")
    check_floating("hidden", hidden)
    check_same_device(hidden=hidden, weight=weight)
    hidden, weight = autocast_inputs(hidden, weight)
    check_same_dtype(hidden=hidden, weight=weight)
    if dims["V"] == 0:
        raise ValueError("weight must have at least one row, got none")
    temperature = _number("temperature", temperature)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or positive, and finite, got {temperature}")
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise TypeError(f"top_k must be None or an integer, got {type(top_k).__name__}")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None:
        top_p = _number("top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        if top_p == 1:  # rounding in the sum of probabilities must not cost the last tokens
            top_p = None
    arguments = (
        hidden, weight, _seed(seed, weight.device), suppressed_ids(suppress, dims["V"], weight.device),
        temperature, top_k, top_p,
    )  # fmt: skip

    name = select_backend("linear_sample", backend, _BACKENDS, hidden)
    if name == "reference":
        with autocast_off(weight.device):
            return reference.linear_sample(*arguments)
    return linear_sample_op(*arguments, name)


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def _seed(seed: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(f"seed must be an integer or an int64 scalar, got {seed.dtype} of shape {list(seed.shape)}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer or an int64 scalar, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit 64 bits, got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device)
