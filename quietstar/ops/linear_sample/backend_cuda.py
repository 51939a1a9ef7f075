"""The row kernel of the ``cuda`` backend: it reads the logits once and draws noise only for tokens that can win."""

from functools import partial

import torch
from torch import Tensor

from quietstar.ops._native import _C, address, launch_place
from quietstar.ops.linear_sample.chunks import sample_in_chunks
from quietstar.ops.linear_sample.inputs import Sampling
from quietstar.ops.linear_sample.noise import GROUP


def sample_rows(logits: Tensor, first_row: int, sampling: Sampling) -> Tensor:
    """One token per row of a chunk of logits: see ``.chunks.SampleKernel``."""
    rows, padded = logits.shape
    if sampling.suppress is not None:
        logits.index_fill_(1, sampling.suppress, float("-inf"))
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _C.cuda.sample_rows(
        address(logits), address(sampling.seed), address(tokens), first_row, sampling.temperature,
        sampling.softcap or 0.0, sampling.top_k or 0, sampling.top_p or 1.0, rows, padded // GROUP,
        *launch_place(logits),
    )  # fmt: skip
    return tokens


sample = partial(sample_in_chunks, sample_rows)
