"""Work in blocks of rows, so that no tensor of size rows x vocabulary is ever stored as a whole."""

import itertools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of logits that the linear ops hold at a time, one matmul per chunk: large enough for full speed, and for reading
# the weight and its gradient once per chunk to be cheap. Assign to change it.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}

# Elementwise passes over logits work in blocks of this size: on a CPU, a block stays in the cache between passes; on a
# GPU, it must be large enough to occupy the whole device.
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}

# Row strides that are a multiple of this keep every row of a chunk aligned for the tensor cores.
_ALIGNMENT = 64


def rows_within(budget: dict[str, int], row_bytes: int, device: torch.device) -> int:
    """Return how many rows of ``row_bytes`` fit the budget of ``device``, at least 1. Other devices count as "cuda"."""
    return max(1, budget.get(device.type, budget["cuda"]) // max(1, row_bytes))


def slices(rows: int, step: int) -> Iterator[slice]:
    """Split 0..rows into consecutive slices of at most ``step``."""
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def blocks(leading: torch.Size, rows: int) -> Iterator[tuple[int | slice, ...]]:
    """Yield indices that cut the leading dimensions of a tensor into views of at most ``rows`` rows, each row once.

    Unlike flattening, indexing never copies, whatever the strides of the leading dimensions.

    >>> list(blocks(torch.Size([2, 5]), 3))
    [(0, slice(0, 3)), (0, slice(3, 5)), (1, slice(0, 3)), (1, slice(3, 5))]
    """
    whole = 1
    for split in reversed(range(len(leading))):  # the innermost dimensions that fit are not split
        if whole * leading[split] > rows:
            outer = itertools.product(*(range(size) for size in leading[:split]))
            return ((*index, part) for index in outer for part in slices(leading[split], max(1, rows // whole)))
        whole *= leading[split]
    return iter([()] if whole else [])


class _Workspace(threading.local):
    """Memory that a thread keeps from one call to the next, at most one chunk."""

    memory: Tensor | None = None


_workspace = _Workspace()


def logits_buffer(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised [rows, vocabulary] tensor whose rows are aligned, whatever the vocabulary.

    On a CPU it is the calling thread's workspace, so only one can be in use at a time. Fresh memory of this size would
    come from the operating system page by page, which costs half as much as the matmul that fills it. (On a GPU,
    PyTorch itself keeps freed memory.)
    """
    padded = -(-vocabulary // _ALIGNMENT) * _ALIGNMENT
    if device.type != "cpu":
        return torch.empty(rows, padded, dtype=dtype, device=device)[:, :vocabulary]
    size = rows * padded * dtype.itemsize
    if _workspace.memory is None or _workspace.memory.nbytes < size:
        _workspace.memory = None  # freed before the larger one is allocated
        with torch.inference_mode(False):  # otherwise it could not be written to outside of inference mode
            _workspace.memory = torch.empty(size, dtype=torch.uint8)
    return _workspace.memory[:size].view(dtype).view(rows, padded)[:, :vocabulary]


def release_logits_buffer() -> None:
    """Free the memory kept by ``logits_buffer`` before something else of that size is needed."""
    _workspace.memory = None
