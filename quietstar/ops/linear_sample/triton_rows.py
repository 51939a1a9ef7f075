"""The row kernel of the ``triton`` backend: draws one token for every row of a chunk of logits.

Drawing the noise of a token takes about 80 instructions, several times the cost of reading its logit, so groups of
tokens that cannot win are not drawn. One kernel reads the logits once and bounds the score of each group of 64 by its
largest logit and its first arrival: 4 bytes per logit and little else. Another kernel runs the race of a row, with one
warp per row: it draws the groups in the order of their bounds until no bound reaches the best score. For V = 32,002
these are 5 to 50 of 501 groups.

top_k and top_p keep the logits from a threshold on, which ``triton_thresholds`` finds first. The bounds cover only
logits that are kept, so thresholds need no further read of the logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quietstar.ops._triton_softcap import cap_logits_
from quietstar.ops.linear_sample import noise
from quietstar.ops.linear_sample.inputs import NO_TOKEN, Sampling
from quietstar.ops.linear_sample.triton_noise import GROUP, arrivals, first_arrivals, row_words
from quietstar.ops.linear_sample.triton_thresholds import threshold_kernel

_GROUPS_A_PROGRAM = 64  # 4096 logits, 32 per thread in flight

# Places of a row, and room for candidates, in the search for thresholds: 16 per thread, with 2 to 19 logits per place.
# More places take more memory and barriers; with fewer, brackets are wider and less of them fits the list.
_FEW_LOGITS, _PLACES, _MANY_PLACES = 65536, 4096, 8192

# Added to bounds, because computed logarithms are not monotonic to the last bit; their error is far smaller than this.
_SLACK = tl.constexpr(1e-5)

_NO_TOKEN = tl.constexpr(NO_TOKEN)

# Compiler options of all kernels here, so that a score is rounded alike in all of them, whatever Triton's default is.
AS_WRITTEN = {"enable_fp_fusion": False}


@triton.jit
def without_nan(logits):
    """Replace NaN, which maxima would ignore, by +∞: no token can be drawn from a row that has either."""
    return tl.where(logits < float("inf"), logits, float("inf"))


@triton.jit(do_not_specialize=["first_row"])
def bounds_kernel(logits, thresholds, seed, bounds, first_row, groups, temperature, GROUPS: tl.constexpr):
    """Compute an upper bound on the scores in each group, +∞ for NaN. Grid: rows · blocks of GROUPS groups."""
    blocks = tl.cdiv(groups, GROUPS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(0) % blocks * GROUPS + tl.arange(0, GROUPS)
    exists = group < groups
    offsets = (row * groups + group) * GROUP
    z = tl.load(logits + offsets[:, None] + tl.arange(0, GROUP)[None, :], mask=exists[:, None], other=float("-inf"))
    largest = tl.max(without_nan(z), 1)
    if thresholds is not None:
        largest = tl.where(largest >= tl.load(thresholds + row), largest, float("-inf"))
    row_low, row_high = row_words(first_row + row)
    first, _ = first_arrivals(tl.load(seed), row_low, row_high, group)
    tl.store(bounds + row * groups + group, largest / temperature - tl.log(first), mask=exists)


@triton.jit(do_not_specialize=["first_row"])
def race_kernel(logits, thresholds, seed, bounds, tokens, first_row, groups, temperature, ALL_GROUPS: tl.constexpr):
    """Find the winner of a row, the lowest token on ties; none if a bound is +∞ or all are −∞. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, ALL_GROUPS)
    bound = tl.load(bounds + row * groups + every, mask=every < groups, other=float("-inf"))
    top, group = tl.max(bound, 0, return_indices=True)
    best = tl.full((), float("-inf"), tl.float32)
    winner = tl.full((), _NO_TOKEN, tl.int32)
    while (top > float("-inf")) & (top < float("inf")) & (top + _SLACK >= best):
        times = arrivals(tl.load(seed), first_row + row + tl.zeros((1,), tl.int64), group, 1)
        place = tl.arange(0, GROUP)[:, None]
        z = tl.load(logits + (row * groups + group) * GROUP + place)
        if thresholds is not None:
            z = tl.where(z >= tl.load(thresholds + row), z, float("-inf"))
        # The single column is taken by a sum: the compiler may reorder a reshape to one dimension, and so the places.
        score, place = tl.max(tl.sum(z / temperature - tl.log(times), 1), 0, return_indices=True)
        token = group * GROUP + place
        better = (score > best) | ((score == best) & (token < winner))
        winner = tl.where(better, token, winner)
        best = tl.maximum(best, score)
        bound = tl.where(every == group, float("-inf"), bound)
        top, group = tl.max(bound, 0, return_indices=True)
    tl.store(tokens + row, winner)


def _thresholds(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return for each row the threshold that a logit must reach to be drawn."""
    rows, size = logits.shape
    block = _PLACES if size <= _FEW_LOGITS else _MANY_PLACES
    thresholds, candidates = logits.new_empty(rows), logits.new_empty(rows, block)
    threshold_kernel[(rows,)](
        logits, candidates, thresholds, size, sampling.temperature, sampling.top_k, sampling.top_p,
        BLOCK=block, num_warps=block // 512, **AS_WRITTEN,
    )  # fmt: skip
    return thresholds


def sample_rows(logits: Tensor, first_row: int, sampling: Sampling) -> Tensor:
    """One token per row of a chunk of logits: see ``.chunks.SampleKernel``."""
    rows, size = logits.shape
    groups = size // noise.GROUP
    seed, temperature = sampling.seed, sampling.temperature
    if sampling.softcap is not None:
        cap_logits_(logits, sampling.softcap)
    if sampling.suppress is not None:
        logits.index_fill_(1, sampling.suppress, float("-inf"))
    thresholds = _thresholds(logits, sampling) if sampling.filtered else None
    bounds = logits.new_empty(rows, groups)
    bounds_kernel[(rows * triton.cdiv(groups, _GROUPS_A_PROGRAM),)](
        logits, thresholds, seed, bounds, first_row, groups, temperature, GROUPS=_GROUPS_A_PROGRAM, num_warps=4,
        **AS_WRITTEN,
    )  # fmt: skip
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    all_groups = triton.next_power_of_2(groups)
    race_kernel[(rows,)](
        logits, thresholds, seed, bounds, tokens, first_row, groups, temperature,
        ALL_GROUPS=all_groups, num_warps=min(max(all_groups // 1024, 1), 8), **AS_WRITTEN,
    )  # fmt: skip
    return tokens
