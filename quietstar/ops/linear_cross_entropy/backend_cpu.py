"""The ``cpu`` backend: its kernels turn logits into nll while they are in the cache, and write and read them once."""

import torch
from torch import Tensor

from quietstar.ops._native import _C, DTYPE_CODES, address, unit_columns
from quietstar.ops._rows import logits_buffer
from quietstar.ops.linear_cross_entropy.inputs import Chunk, ChunkResult, MixedHidden

__all__ = ["MixedHidden", "solve_chunk"]

# Rows of the kernels' largest tile.
_TILE_ROWS = 12


def solve_chunk(chunk: Chunk, d_weight: Tensor | None, needs_hidden: bool, needs_weight: bool) -> ChunkResult:
    """Compute nll, entropy and gradients of one chunk: see ``.chunks.ChunkKernel``."""
    (rows, size), vocabulary = chunk.hidden.shape, chunk.weight.shape[0]
    hidden, weight, target = unit_columns(chunk.hidden), unit_columns(chunk.weight), chunk.target.contiguous()
    suppress = None if chunk.softmax.suppress is None else chunk.softmax.suppress.contiguous()
    nll_scale, entropy_scale = (None, None) if chunk.scales is None else chunk.scales.each(Tensor.contiguous)
    nll, entropy = torch.empty(rows), torch.empty(rows) if chunk.entropy else None
    d_hidden = torch.empty(rows, size) if needs_hidden else None
    add = d_weight is not None
    if needs_weight and not add:
        d_weight = torch.empty(vocabulary, size)
    room = None
    if chunk.scales is not None:
        room = logits_buffer(-(-rows // _TILE_ROWS) * _TILE_ROWS, vocabulary, torch.float32, weight.device)
    _C.cpu.linear_cross_entropy(
        DTYPE_CODES[weight.dtype], address(hidden), hidden.stride(0), address(weight), weight.stride(0),
        address(target), address(nll_scale), address(entropy_scale), address(suppress),
        0 if suppress is None else len(suppress), chunk.softmax.temperature, chunk.softmax.softcap or 0.0,
        address(room), address(nll), address(entropy), address(d_hidden), address(d_weight) if needs_weight else 0, add,
        rows, vocabulary, size, torch.get_num_threads(),
    )  # fmt: skip
    return ChunkResult(nll, entropy, d_hidden, d_weight)
