"""Row kernel of the ``cpu`` backend: logits are read from memory once, and only what can win is drawn."""

import torch
from torch import Tensor

from quietstar.ops._native import _C, address
from quietstar.ops.linear_sample.noise import GROUP


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
    if temperature == 0:
        if suppress is not None:
            logits.index_fill_(1, suppress, float("-inf"))
        return logits.argmax(dim=1)
    tokens = torch.empty(rows, dtype=torch.int64)
    suppress = None if suppress is None else suppress.contiguous()
    _C.cpu.sample_rows(
        address(logits), address(tokens), address(suppress), 0 if suppress is None else len(suppress), int(seed),
        first_row, temperature, 0 if top_k is None else min(top_k, vocabulary), 1.0 if top_p is None else top_p,
        rows, padded // GROUP, torch.get_num_threads(),
    )  # fmt: skip
    return tokens
