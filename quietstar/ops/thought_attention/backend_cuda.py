"""The ``cuda`` backend: a fused forward for a sampling step and for decoding behind a long cache; no backward.

With few query rows the keys are split over blocks, whose results a second kernel adds up in fixed order.
"""

import torch
from torch import Tensor

from quietstar.ops._cuda import launch_place, processors
from quietstar.ops._native import _C, DTYPE_CODES, address, unit_columns
from quietstar.ops.thought_attention.inputs import Inputs, Mask, Result

# A block takes at least this many keys: for fewer, starting it and adding up its result cost more.
_SPLIT_KEYS = 256
_BLOCKS_OF_A_PROCESSOR = 2


def forward(inputs: Inputs, mask: Mask) -> Result:
    """See ``backends.py``."""
    query, key = inputs.query, inputs.key
    output = torch.empty(inputs.output_shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    batch, query_heads, num_anchors, steps, head_size = query.shape
    kv_heads, length = key.shape[1:3]
    sizes = [batch, query_heads, kv_heads, num_anchors, steps, inputs.thought_steps, length, head_size]
    splits = _splits(query, kv_heads, length)
    split_output = split_lse = None
    if splits > 1:
        split_output = torch.empty(splits, *output.shape, dtype=torch.float32, device=query.device)
        split_lse = torch.empty(splits, *lse.shape, dtype=torch.float32, device=query.device)
    held = [unit_columns(x) for x in inputs]
    indices = [None if x is None else x.expand(batch, num_anchors) for x in (mask.anchors, mask.key_start)]
    _C.cuda.thought_attention(
        DTYPE_CODES[query.dtype], sizes, *((address(x), x.stride()[:-1]) for x in held),
        *((0, (0, 0)) if x is None else (address(x), (x.stride(0), min(x.stride(1), 1))) for x in indices),
        length if mask.window is None else mask.window, mask.scale, address(output), address(lse),
        address(split_output), address(split_lse), splits, *launch_place(query),
    )  # fmt: skip
    return Result(output, lse)


def _splits(query: Tensor, kv_heads: int, length: int) -> int:
    """Into how many parts to split the keys, so that all processors have work."""
    batch, query_heads, num_anchors, steps, _ = query.shape
    rows = num_anchors * steps * (query_heads // kv_heads)
    blocks = batch * kv_heads * -(-rows // _C.cuda.TILE_ROWS)
    resident = _BLOCKS_OF_A_PROCESSOR * processors(query.device)
    return max(1, min(resident // blocks, -(-length // _SPLIT_KEYS)))
