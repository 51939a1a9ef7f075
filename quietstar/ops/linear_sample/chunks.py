"""The chunk loop of sampling: matmul to logits, row kernel to tokens."""

from typing import Protocol

import torch
from torch import Tensor

from quietstar.ops._head_matmuls import logits_into
from quietstar.ops._precision import compute_dtype
from quietstar.ops._rows import CHUNK_BYTES, logits_buffer, rows_within, slices
from quietstar.ops.linear_sample.noise import GROUP


class SampleKernel(Protocol):
    """What a backend provides: one token for every row of a chunk of logits."""

    def __call__(
        self,
        logits: Tensor,
        vocabulary: int,
        first_row: int,
        seed: Tensor,
        suppress: Tensor | None,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
    ) -> Tensor:
        """Token ids [n], int64; ``winner.NO_TOKEN`` where none can be drawn.

        Args:
            logits: contiguous [n, V rounded up to whole groups of the noise] in float32 (float64), −∞ from V on.
                May be overwritten, but for the −∞ from V on.
            vocabulary: V.
            first_row: row number of the chunk's first row, for the noise.
            seed: int64 scalar tensor on the device of the logits.
            suppress, temperature, top_k, top_p: as in ``linear_sample``.
        """


def sample_in_chunks(
    row_kernel: SampleKernel,
    hidden: Tensor,
    weight: Tensor,
    seed: Tensor,
    suppress: Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Tensor:
    """Token ids int64 [rows], by the row kernel of a backend."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    dtype, padded = compute_dtype(hidden.dtype), -(-vocabulary // GROUP) * GROUP
    tokens = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    step = min(rows_within(CHUNK_BYTES, padded * dtype.itemsize, hidden.device), max(rows, 1))
    buffer = logits_buffer(step, padded, dtype, hidden.device)
    buffer[:, vocabulary:] = float("-inf")
    for part in slices(rows, step):
        logits = buffer[: part.stop - part.start]
        logits_into(logits[:, :vocabulary], hidden[part], weight)
        tokens[part] = row_kernel(logits, vocabulary, part.start, seed, suppress, temperature, top_k, top_p)
    return tokens
