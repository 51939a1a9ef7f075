"""Row kernel of the ``cuda`` backend: logits are read from memory once, and only what can win is drawn."""

from functools import partial

import torch
from torch import Tensor

from quietstar.ops._cuda import launch_place
from quietstar.ops._native import _C, address
from quietstar.ops.linear_sample.chunks import sample_in_chunks
from quietstar.ops.linear_sample.noise import GROUP
from quietstar.ops.linear_sample.winner import best_token


def sample_rows(
    logits: Tensor,
    vocabulary: int,
    first_row: int,
    seed: Tensor,
    suppress: Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Tensor:
    """One token per row of a chunk of logits: see :class:`.chunks.SampleKernel`."""
    rows, padded = logits.shape
    if suppress is not None:
        logits.index_fill_(1, suppress, float("-inf"))
    if temperature == 0:
        return best_token(logits)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _C.cuda.sample_rows(
        address(logits), address(seed), address(tokens), first_row, temperature,
        0 if top_k is None else top_k, 1.0 if top_p is None else top_p, rows, padded // GROUP,
        *launch_place(logits),
    )  # fmt: skip
    return tokens


sample = partial(sample_in_chunks, sample_rows)
