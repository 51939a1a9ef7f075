"""Chunk kernel of the ``cpu`` backend: logits become nll in the caches; they are written once and read once."""

import torch
from torch import Tensor

from quietstar.ops._native import _C, DTYPE_CODES, address, unit_columns
from quietstar.ops._rows import logits_buffer

# Rows of the largest tile of the kernels.
_TILE_ROWS = 12


def cross_entropy_chunk(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: Tensor | None,
    temperature: float,
    suppress: Tensor | None,
    d_weight: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Nll and gradients of one chunk: see :class:`.chunks.ChunkKernel`."""
    (rows, size), vocabulary = hidden.shape, weight.shape[0]
    hidden, weight = unit_columns(hidden), unit_columns(weight)
    target, scale, suppress = (None if x is None else x.contiguous() for x in (target, scale, suppress))
    nll = torch.empty(rows)
    d_hidden = torch.empty(rows, size) if needs_hidden else None
    add = d_weight is not None
    if needs_weight and not add:
        d_weight = torch.empty(vocabulary, size)
    room = None
    if scale is not None:
        room = logits_buffer(-(-rows // _TILE_ROWS) * _TILE_ROWS, vocabulary, torch.float32, weight.device)
    _C.cpu.linear_cross_entropy(
        DTYPE_CODES[weight.dtype], address(hidden), hidden.stride(0), address(weight), weight.stride(0),
        address(target), address(scale), address(suppress), 0 if suppress is None else len(suppress), temperature,
        address(room), address(nll), address(d_hidden), address(d_weight) if needs_weight else 0, add,
        rows, vocabulary, size, torch.get_num_threads(),
    )  # fmt: skip
    return nll, d_hidden, d_weight
