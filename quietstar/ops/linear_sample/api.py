"""The public function ``linear_sample``, and the registered op, which has no gradient."""

from collections.abc import Iterable

import torch
from torch import Tensor

from quietstar.ops._backend import select_backend
from quietstar.ops._checks import Dims, check_floating, check_same_device, check_same_dtype
from quietstar.ops._dtensor import gathered
from quietstar.ops._precision import autocast_inputs, autocast_off
from quietstar.ops._registration import register_op
from quietstar.ops._vocabulary import check_head, checked_number, checked_softcap, checked_temperature, suppressed_ids
from quietstar.ops.linear_sample import reference
from quietstar.ops.linear_sample.backends import BACKENDS
from quietstar.ops.linear_sample.inputs import Sampling, check_drawn


def _linear_sample(hidden, weight, *arguments):
    *sampling, backend = arguments
    return BACKENDS[backend].load().sample(hidden, weight, Sampling(*sampling))


_linear_sample_op = register_op(
    "linear_sample(Tensor hidden, Tensor weight, Tensor seed, float temperature, float? softcap, Tensor? suppress,"
    " int? top_k, float? top_p, str backend) -> Tensor",
    _linear_sample,
    lambda hidden, *_: hidden.new_empty(hidden.shape[0], dtype=torch.int64),
)


@torch.no_grad()
def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    temperature: float = 1.0,
    suppress: Iterable[int] | Tensor | None = None,
    softcap: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Tensor,
    backend: str | None = None,
) -> Tensor:
    """Draw one token per row from softmax(hidden @ weight.T / temperature) without storing the logits of all rows.

    Uses the Gumbel-max trick: the token with the largest sum of logit and noise wins. The noise depends only on seed,
    row number and token id (``quietstar.ops.linear_sample.noise``), so neither chunking nor the backend changes the
    tokens, except where two tokens tie to within the rounding of their logits. Not differentiable.

    A logit of −∞ means probability 0. No token can be drawn from a row if a logit that is not suppressed is NaN or +∞,
    or if all logits are −∞. On the CPU this raises an error; on CUDA, and inside ``torch.compile``, the token is −1.

    Args:
        hidden: [rows, H], floating point, H ≥ 1.
        weight: [V, H], in the dtype of ``hidden`` (inside autocast both are cast to the autocast dtype). A DTensor,
            sharded by FSDP or replicated, is gathered for the call.
        temperature: divisor of the logits, from 1e-30 to 1e30, or 0 for greedy: the largest logit, lowest id on ties.
        suppress: token ids that are never drawn: an int tensor [n] on the device of ``weight``, or integers (only a
            few: on a GPU each is sent separately).
        softcap: c from 1e-30 to 1e30: logits become c · tanh(logits / c) before they are divided by the temperature
            (Gemma 2, arXiv 2408.00118); infinite ones stay as they are. Default: no cap.
        top_k: ≥ 1: draw only from the k most likely tokens and any as likely as the k-th. Default: all tokens.
        top_p: in (0, 1]: draw only from the smallest set of most likely tokens whose total probability (at this
            temperature, after ``top_k``) is at least this, and any as likely as the last of them. Default: all tokens.
        seed: 64-bit integer, or an int64 scalar tensor on the device of ``weight`` or on the CPU. A tensor on the
            device of ``weight`` is not read by the host: a captured CUDA graph draws anew after ``seed.add_(1)``.
        backend: None, "auto", a name or a list such as "cuda,triton": see ``quietstar.ops``.

    Returns:
        Token ids, int64 [rows]; never a suppressed one.

    Example:
        >>> linear_sample(100 * torch.eye(3), torch.eye(3), seed=0)
        tensor([0, 1, 2])

    Raises:
        TypeError: an argument has the wrong type, or ``hidden`` and ``weight`` have different dtypes.
        ValueError: shapes or devices disagree, H = 0, ``temperature`` or ``softcap`` is out of range, ``top_k`` < 1,
            ``top_p`` is outside (0, 1], a suppressed id is out of range, every token is suppressed, the seed exceeds 64
            bits, or the backend is unknown or unavailable; on the CPU also if no token can be drawn from a row
            (``QUIETSTAR_CHECK_VALUES`` turns the check on for CUDA too).
    """
    tokens = draw(
        hidden, weight, temperature=temperature, suppress=suppress, softcap=softcap, top_k=top_k, top_p=top_p,
        seed=seed, backend=backend,
    )  # fmt: skip
    check_drawn(tokens)
    return tokens


@torch.no_grad()
def draw(
    hidden: Tensor,
    weight: Tensor,
    *,
    temperature: float,
    suppress: Iterable[int] | Tensor | None = None,
    softcap: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Tensor,
    backend: str | None = None,
) -> Tensor:
    """Like ``linear_sample``, but returns −1 for a row without a token on every device; the caller checks for NaN."""
    weight = gathered("weight", weight)
    dims = Dims()
    dims.bind("hidden", hidden, "rows H")
    dims.bind("weight", weight, "V H")
    check_floating("hidden", hidden)
    check_same_device(hidden=hidden, weight=weight)
    hidden, weight = autocast_inputs(hidden, weight)
    check_same_dtype(hidden=hidden, weight=weight)
    check_head(dims["V"], dims["H"], "hidden")
    temperature = checked_temperature(temperature, zero=True)
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise TypeError(f"top_k must be None or an integer, got {type(top_k).__name__}")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_k >= dims["V"]:
            top_k = None
    if top_p is not None:
        top_p = checked_number("top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        if top_p == 1:  # rounding in the sum of probabilities must not cost the last tokens
            top_p = None
    sampling = Sampling(
        _seed(seed, weight.device), temperature, checked_softcap(softcap),
        suppressed_ids(suppress, dims["V"], weight.device), top_k, top_p,
    )  # fmt: skip

    name = select_backend("linear_sample", backend, BACKENDS, hidden, hidden=hidden, weight=weight)
    if name == "reference":
        with autocast_off(weight.device):
            return reference.linear_sample(hidden, weight, sampling)
    return _linear_sample_op(hidden, weight, *sampling, name)


def _seed(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed as a scalar tensor on ``device``."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(f"seed must be an integer or an int64 scalar, got {seed.dtype} of shape {list(seed.shape)}")
        if seed.device == device:
            return seed
        if seed.device.type != "cpu":
            raise ValueError(f"seed must be on the device of weight, {device}, or on the CPU, got {seed.device}")
        # Filled on the device, see suppressed_ids.
        return torch.empty((), dtype=torch.int64, device=device).fill_(seed)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer or an int64 scalar, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit 64 bits, got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device)
