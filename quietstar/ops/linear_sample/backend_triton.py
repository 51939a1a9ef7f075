"""Sampling for few rows: noise and argmax are computed in the epilogue of the matmul, so that no logits are written.

For n rows the head is read once, V·H elements, against 2·n·V·H FLOPs. Up to 128 rows this is bound by memory: 0.06 ms
on an H200 at V = 32,002, H = 4096 in half precision. A program has BLOCK_V tokens, in whole groups of the noise, and
all rows. Tokens are the rows of its products, because a tensor core tile has at least 64 rows but as few as 8 columns.
A program keeps one winner for every row, and a second kernel picks the best over all programs. The noise of all tokens
is drawn: at 128 rows, 80 instructions for each of n·V logits take about 0.01 ms.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quietstar.ops._launch_table import ANY, row_for
from quietstar.ops._triton_softcap import capped
from quietstar.ops.linear_sample.chunks import sample_in_chunks
from quietstar.ops.linear_sample.inputs import NO_TOKEN, Sampling
from quietstar.ops.linear_sample.triton_noise import GROUP, arrivals
from quietstar.ops.linear_sample.triton_rows import AS_WRITTEN, sample_rows, without_nan

MOST_ROWS = 128

_NO_TOKEN = tl.constexpr(NO_TOKEN)


class Tile(NamedTuple):
    """Launch parameters: tokens of a program, elements of H in a step, and steps in flight."""

    tokens: int
    step: int
    num_warps: int
    num_stages: int


SAMPLE = "sample"

# By kernel, architecture and rows, rounded up. For half precision, with two programs and about 64 KiB of the head in
# flight on each multiprocessor. Full precision uses half the step.
TILES: dict[tuple[str, str, int], Tile] = {
    (SAMPLE, ANY, 16): Tile(64, 128, 4, 4),
    (SAMPLE, ANY, 32): Tile(64, 128, 4, 4),
    (SAMPLE, ANY, 64): Tile(128, 64, 8, 4),
    (SAMPLE, ANY, 128): Tile(128, 64, 8, 4),
}


@triton.jit
def _store_winners(
    logits, first_row, first_token, seed, suppressed, scores, tokens, rows, vocabulary, temperature, softcap
):  # fmt: skip
    """Store the best score (+∞ also for NaN) and its token for every column of ``logits`` [tokens, rows]."""
    BLOCK_V: tl.constexpr = logits.shape[0]
    BLOCK_M: tl.constexpr = logits.shape[1]
    token = first_token + tl.arange(0, BLOCK_V)
    row = first_row + tl.arange(0, BLOCK_M)
    allowed = token < vocabulary
    if suppressed is not None:
        allowed = allowed & (tl.load(suppressed + token, mask=allowed, other=1) == 0)
    if softcap is not None:
        logits = capped(logits, softcap)
    if temperature is not None:
        times = arrivals(tl.load(seed), row.to(tl.int64), first_token // GROUP, BLOCK_V // GROUP)
        logits = logits / temperature - tl.log(times)
    best, place = tl.max(tl.where(allowed[:, None], without_nan(logits), float("-inf")), 0, return_indices=True)
    offsets = tl.program_id(0) * rows + row
    tl.store(scores + offsets, best, mask=row < rows)
    tl.store(tokens + offsets, first_token + place, mask=row < rows)


@triton.jit
def _halves(logits):
    """Return the left and the right half of the columns."""
    BLOCK_V: tl.constexpr = logits.shape[0]
    HALF: tl.constexpr = logits.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(logits, (BLOCK_V, 2, HALF)), (0, 2, 1)))


@triton.jit(do_not_specialize=["rows"])
def matmul_sample_kernel(
    hidden, weight, seed, suppressed, scores, tokens, hidden_strides, weight_strides, rows, vocabulary, hidden_size,
    temperature, softcap, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
):  # fmt: skip
    """Find the winner of every row among BLOCK_V tokens; greedy if ``temperature`` is None. Grid: blocks of tokens."""
    first_token = tl.program_id(0) * BLOCK_V
    # Tokens and rows beyond the last repeat the last, and are dropped at the end.
    token = tl.minimum(first_token + tl.arange(0, BLOCK_V), vocabulary - 1).to(tl.int64)
    row = tl.minimum(tl.arange(0, BLOCK_M), rows - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    weight += token[:, None] * weight_strides[0] + k[None, :] * weight_strides[1]
    hidden += row[:, None] * hidden_strides[0] + k[None, :] * hidden_strides[1]
    acc = tl.zeros((BLOCK_V, BLOCK_M), tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        if WHOLE_STEPS:
            w, h = tl.load(weight), tl.load(hidden)
        else:
            inside = k[None, :] < hidden_size - start
            w, h = tl.load(weight, mask=inside, other=0.0), tl.load(hidden, mask=inside, other=0.0)
        acc = tl.dot(w, tl.trans(h), acc, input_precision="ieee")
        weight += BLOCK_K * weight_strides[1]
        hidden += BLOCK_K * hidden_strides[1]
    if BLOCK_M == 128:  # a quarter of the rows at a time, as the noise of all would not fit the registers
        left, right = _halves(acc)
        left_left, left_right = _halves(left)
        right_left, right_right = _halves(right)
        quarters = left_left, left_right, right_left, right_right
        for i in tl.static_range(4):
            _store_winners(
                quarters[i], 32 * i, first_token, seed, suppressed, scores, tokens, rows, vocabulary, temperature,
                softcap,
            )  # fmt: skip
    else:
        _store_winners(acc, 0, first_token, seed, suppressed, scores, tokens, rows, vocabulary, temperature, softcap)


@triton.jit(do_not_specialize=["rows"])
def pick_kernel(scores, candidates, tokens, blocks, rows, ALL_BLOCKS: tl.constexpr):
    """Pick the best of a row's candidates [blocks, rows], the first on ties, if its score is finite. Grid: rows."""
    row = tl.program_id(0)
    block = tl.arange(0, ALL_BLOCKS)
    score = tl.load(scores + block * rows + row, mask=block < blocks, other=float("-inf"))
    score, best = tl.max(score, 0, return_indices=True)
    token = tl.load(candidates + best * rows + row)
    tl.store(tokens + row, tl.where((score > float("-inf")) & (score < float("inf")), token, _NO_TOKEN))


def sample(hidden: Tensor, weight: Tensor, sampling: Sampling) -> Tensor:
    """Draw token ids int64 [rows]: see ``reference.linear_sample``."""
    if not 0 < hidden.shape[0] <= MOST_ROWS or sampling.filtered:
        return sample_in_chunks(sample_rows, hidden, weight, sampling)
    (rows, hidden_size), vocabulary = hidden.shape, weight.shape[0]
    suppressed = None
    if sampling.suppress is not None:
        suppressed = torch.zeros(vocabulary, dtype=torch.int8, device=hidden.device)
        suppressed.index_fill_(0, sampling.suppress, 1)
    block_m = max(triton.next_power_of_2(rows), 16)
    tile = row_for(TILES, SAMPLE, hidden, block_m)
    step = tile.step * 2 // max(hidden.element_size(), 2)
    blocks = triton.cdiv(vocabulary, tile.tokens)
    scores = torch.empty(blocks, rows, dtype=torch.float32, device=hidden.device)
    candidates = torch.empty(blocks, rows, dtype=torch.int32, device=hidden.device)
    matmul_sample_kernel[(blocks,)](
        hidden, weight, sampling.seed, suppressed, scores, candidates, hidden.stride(), weight.stride(), rows,
        vocabulary, hidden_size, sampling.temperature or None, sampling.softcap, BLOCK_V=tile.tokens, BLOCK_M=block_m,
        BLOCK_K=step, WHOLE_STEPS=hidden_size % step == 0, num_warps=tile.num_warps, num_stages=tile.num_stages,
        **AS_WRITTEN,
    )  # fmt: skip
    tokens = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    pick_kernel[(rows,)](
        scores, candidates, tokens, blocks, rows, ALL_BLOCKS=triton.next_power_of_2(blocks), num_warps=1, **AS_WRITTEN
    )
    return tokens
