"""The ``cpu`` backend of sampling: logits are computed in the cache; only those that can win are written and drawn."""

import torch
from torch import Tensor

from quietstar.ops._native import _C, DTYPE_CODES, address, unit_columns
from quietstar.ops._rows import CHUNK_BYTES, logits_buffer, rows_within, slices
from quietstar.ops.linear_sample.chunks import sample_in_chunks
from quietstar.ops.linear_sample.inputs import Sampling
from quietstar.ops.linear_sample.noise import GROUP

# A single row is bound by reading the weight in either case.
FEWEST_ROWS = 2


def sample_rows(logits: Tensor, first_row: int, sampling: Sampling) -> Tensor:
    """One token per row of a chunk of logits: see ``.chunks.SampleKernel``."""
    rows, padded = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    suppress = None if sampling.suppress is None else sampling.suppress.contiguous()
    _C.cpu.sample_rows(
        address(logits), address(tokens), address(suppress), 0 if suppress is None else len(suppress),
        int(sampling.seed), first_row, sampling.temperature, sampling.softcap or 0.0, sampling.top_k or 0,
        sampling.top_p or 1.0, rows, padded // GROUP, torch.get_num_threads(),
    )  # fmt: skip
    return tokens


def sample(hidden: Tensor, weight: Tensor, sampling: Sampling) -> Tensor:
    """Draw token ids int64 [rows]: see ``reference.linear_sample``.

    For many rows, logits are computed in the cache and only those that can win are written.
    """
    (rows, size), vocabulary = hidden.shape, weight.shape[0]
    if rows < FEWEST_ROWS or sampling.temperature == 0 or sampling.filtered:
        return sample_in_chunks(sample_rows, hidden, weight, sampling)
    hidden, weight, padded = unit_columns(hidden), unit_columns(weight), -(-vocabulary // GROUP) * GROUP
    suppress = None if sampling.suppress is None else sampling.suppress.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64)
    step = min(rows_within(CHUNK_BYTES, padded * 4, weight.device), rows)
    logits = logits_buffer(step, padded, torch.float32, weight.device)
    for part in slices(rows, step):
        _C.cpu.linear_sample(
            DTYPE_CODES[hidden.dtype], address(hidden[part]), hidden.stride(0), address(weight), weight.stride(0),
            address(logits), address(tokens[part]), address(suppress), 0 if suppress is None else len(suppress),
            int(sampling.seed), part.start, sampling.temperature, sampling.softcap or 0.0, part.stop - part.start,
            vocabulary, size, torch.get_num_threads(),
        )  # fmt: skip
    return tokens
