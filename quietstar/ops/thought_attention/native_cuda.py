"""The ``cuda`` backend: a fused forward for a sampling step and for decoding behind a long cache; no backward.

With few query rows the keys are split over blocks, whose results a second kernel adds up in fixed order.
"""

import torch
from torch import Tensor

from quietstar.ops._cuda import launch_place, processors
from quietstar.ops._native import _C, DTYPE_CODES, address, unit_columns
from quietstar.ops.thought_attention.reference import per_anchor

# A block takes at least this many keys: for fewer, starting it and adding up its result cost more.
_SPLIT_KEYS = 256
_BLOCKS_OF_A_PROCESSOR = 2


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thought_key: Tensor,
    thought_value: Tensor,
    anchors: Tensor | None,
    key_start: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, P, S, D] in the dtype of ``query`` and lse [B, Hq, P, S] in float32."""
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    batch, query_heads, num_anchors, steps, head_size = query.shape
    kv_heads, length = key.shape[1:3]
    sizes = [batch, query_heads, kv_heads, num_anchors, steps, thought_key.shape[3], length, head_size]
    splits = _splits(query, kv_heads, length)
    split_output = split_lse = None
    if splits > 1:
        split_output = torch.empty(splits, *query.shape, dtype=torch.float32, device=query.device)
        split_lse = torch.empty(splits, *lse.shape, dtype=torch.float32, device=query.device)
    held = [unit_columns(x) for x in (query, key, value, thought_key, thought_value)]
    indices = anchors, None if key_start is None else per_anchor(key_start)
    indices = [None if x is None else unit_columns(x.to(torch.int64)).expand(batch, num_anchors) for x in indices]
    _C.cuda.thought_attention(
        DTYPE_CODES[query.dtype], sizes, *((address(x), x.stride()[:-1]) for x in held),
        *((0, (0, 0)) if x is None else (address(x), (x.stride(0), min(x.stride(1), 1))) for x in indices),
        length if window is None else window, scale, address(output), address(lse), address(split_output),
        address(split_lse), splits, *launch_place(query),
    )  # fmt: skip
    return output, lse


def backward(*_: object) -> tuple[Tensor, ...]:
    """Raises: the public function lets no call through that needs a gradient."""
    raise NotImplementedError("the cuda backend of thought_attention has no backward")


def _splits(query: Tensor, kv_heads: int, length: int) -> int:
    """Into how many parts to split the keys, so that all processors have work."""
    batch, query_heads, num_anchors, steps, _ = query.shape
    rows = num_anchors * steps * (query_heads // kv_heads)
    blocks = batch * kv_heads * -(-rows // _C.cuda.TILE_ROWS)
    resident = _BLOCKS_OF_A_PROCESSOR * processors(query.device)
    return max(1, min(resident // blocks, -(-length // _SPLIT_KEYS)))
