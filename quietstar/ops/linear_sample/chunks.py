"""The chunk loop of sampling: a matmul computes logits, and a row kernel draws tokens from them."""

from typing import Protocol

import torch
from torch import Tensor

from quietstar.ops._head_matmuls import logits_into
from quietstar.ops._precision import compute_dtype
from quietstar.ops._rows import CHUNK_BYTES, logits_buffer, rows_within, slices
from quietstar.ops._vocabulary import cap_logits_
from quietstar.ops.linear_sample.inputs import Sampling, best_token
from quietstar.ops.linear_sample.noise import GROUP


class SampleKernel(Protocol):
    """The function that a backend provides to draw one token for every row of a chunk of logits."""

    def __call__(self, logits: Tensor, first_row: int, sampling: Sampling) -> Tensor:
        """Draw token ids [n], int64; ``inputs.NO_TOKEN`` where none can be drawn.

        Args:
            logits: contiguous [n, V rounded up to whole groups of the noise] in float32 (float64), −∞ from V on.
                May be overwritten, except for the −∞ from V on.
            first_row: row number of the chunk's first row, for the noise.
            sampling: how to draw; its temperature is not 0.
        """


def sample_in_chunks(row_kernel: SampleKernel, hidden: Tensor, weight: Tensor, sampling: Sampling) -> Tensor:
    """Draw token ids int64 [rows] with a backend's row kernel, or by argmax if the temperature is 0."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    dtype, padded = compute_dtype(hidden.dtype), -(-vocabulary // GROUP) * GROUP
    tokens = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    step = min(rows_within(CHUNK_BYTES, padded * dtype.itemsize, hidden.device), max(rows, 1))
    buffer = logits_buffer(step, padded, dtype, hidden.device)
    buffer[:, vocabulary:] = float("-inf")
    for part in slices(rows, step):
        logits = buffer[: part.stop - part.start]
        logits_into(logits[:, :vocabulary], hidden[part], weight)
        if sampling.temperature == 0:
            cap_and_suppress_(logits, sampling)
            tokens[part] = best_token(logits)
        else:
            tokens[part] = row_kernel(logits, part.start, sampling)
    return tokens


def cap_and_suppress_(logits: Tensor, sampling: Sampling) -> None:
    """Cap logits and set those of suppressed tokens to −∞, in place, with library calls."""
    cap_logits_(logits, sampling.softcap)
    if sampling.suppress is not None:
        logits.index_fill_(1, sampling.suppress, float("-inf"))
