"""Work in blocks of rows, so that nothing of size rows x vocabulary is ever held as a whole."""

import itertools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# Logits held at a time by the linear ops, one matmul per chunk: large enough for full speed and for reading the
# weight and its gradient once per chunk to be cheap. Assign to change it.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}

# Elementwise passes over logits go through blocks of this size: on a CPU they then stay in the cache between passes,
# on a GPU a block must be large enough to fill the machine.
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}

# Leading dimensions that are a multiple of this keep every row of a chunk aligned for the matrix units.
_ALIGNMENT = 64


def rows_within(budget: dict[str, int], row_bytes: int, device: torch.device) -> int:
    """How many rows of ``row_bytes`` fit the budget of ``device``; at least one. Unlisted devices count as "cuda"."""
    return max(1, budget.get(device.type, budget["cuda"]) // max(1, row_bytes))


def slices(rows: int, step: int) -> Iterator[slice]:
    """0..rows in consecutive slices of at most ``step``."""
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def blocks(leading: torch.Size, rows: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut the leading dimensions of a tensor into views of at most ``rows`` rows, covering each row once.

    Indexing works where flattening would have to copy, for leading dimensions of any strides.

    >>> list(blocks(torch.Size([2, 5]), 3))
    [(0, slice(0, 3)), (0, slice(3, 5)), (1, slice(0, 3)), (1, slice(3, 5))]
    """
    whole = 1
    for split in reversed(range(len(leading))):  # the innermost dimensions that fit are taken whole
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
    """An uninitialised [rows, vocabulary] tensor whose rows are aligned, whatever the vocabulary.

    On a CPU it is the calling thread's workspace, so only one is in use at a time: fresh memory of this size comes
    from the operating system page by page, which would cost half as much again as the matmul that fills it. (On a GPU
    PyTorch keeps freed memory by itself.)
    """
    padded = -(-vocabulary // _ALIGNMENT) * _ALIGNMENT
    if device.type != "cpu":
        return torch.empty(rows, padded, dtype=dtype, device=device)[:, :vocabulary]
    size = rows * padded * dtype.itemsize
    if _workspace.memory is None or _workspace.memory.nbytes < size:
        _workspace.memory = None  # goes before the larger one comes
        with torch.inference_mode(False):  # or else it could not be written to outside of inference mode
            _workspace.memory = torch.empty(size, dtype=torch.uint8)
    return _workspace.memory[:size].view(dtype).view(rows, padded)[:, :vocabulary]


def release_logits_buffer() -> None:
    """Give the memory kept by ``logits_buffer`` back, before something else of that size is needed."""
    _workspace.memory = None
