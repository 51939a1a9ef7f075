"""The noise of sampling in Triton: the arrival times that ``noise.py`` defines, from the same bits."""

import triton
import triton.language as tl

from quietstar.ops.linear_sample import noise

GROUP = tl.constexpr(noise.GROUP)
_TOKENS = tl.constexpr(0)
_GROUPS = tl.constexpr(1)
_UNIT = tl.constexpr(2.0**-32)
_BELOW_ONE = tl.constexpr(1 - 2.0**-24)


@triton.jit
def exponential(word):
    """Compute −log1p(−u) for the u that a word stands for.

    With y = 1 − u rounded, log(y)·u/(1 − y) is free of the error of y, both for small u, where log(y) alone would have
    lost all digits, and for large u.
    """
    u = tl.minimum((word.to(tl.float32) + 0.5) * _UNIT, _BELOW_ONE)
    y = 1 - u
    return tl.where(y == 1, u, -tl.log(y) * u / tl.where(y == 1, 1.0, 1 - y))


@triton.jit
def row_words(rows):
    """Return the two words of the counter that hold int64 row numbers."""
    return (rows & 0xFFFFFFFF).to(tl.uint32), ((rows >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def first_arrivals(seed, row_low, row_high, groups):
    """Compute each group's first arrival time and its token's place, 0 … 63; ``groups`` broadcasts against the rows."""
    x0, y0, x1, y1 = tl.philox(seed, groups // 2, row_low, row_high, _GROUPS)
    even = groups % 2 == 0
    return exponential(tl.where(even, x0, x1)) / GROUP, (tl.where(even, y0, y1) >> 26).to(tl.int32)


@triton.jit
def arrivals(seed, rows, first_group, GROUPS: tl.constexpr):
    """Compute arrival times [GROUPS · 64, M] of the tokens of consecutive groups, for int64 rows [M]."""
    M: tl.constexpr = rows.shape[0]
    CALLS: tl.constexpr = GROUPS * GROUP // 4
    row_low, row_high = row_words(rows[None, :])
    first, place = first_arrivals(seed, row_low, row_high, first_group + tl.arange(0, GROUPS)[:, None])
    calls = first_group * (GROUP // 4) + tl.arange(0, CALLS)
    x0, x1, x2, x3 = tl.philox(seed, calls[:, None], row_low, row_high, _TOKENS)
    pairs = tl.join(exponential(x0), exponential(x2)), tl.join(exponential(x1), exponential(x3))
    later = tl.permute(tl.join(pairs[0], pairs[1]), (0, 2, 3, 1))  # [CALLS, 2, 2, M]: word 2i + j at (i, j)
    later = tl.reshape(later, (GROUPS, GROUP, M))
    is_first = tl.arange(0, GROUP)[None, :, None] == place[:, None, :]
    return tl.reshape(first[:, None, :] + tl.where(is_first, 0.0, later), (GROUPS * GROUP, M))
