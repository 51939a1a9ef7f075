"""The ``cuda`` backend: a fused forward for a sampling step and for decoding with a long cache.

Gradients are computed by another backend's backward (``backends.py``).

If there are few query rows, the keys are split over blocks, whose results a second kernel combines in fixed order.
"""

import torch
from torch import Tensor

from quietstar.ops._native import _C, DTYPE_CODES, address, launch_place, processors, unit_columns
from quietstar.ops.thought_attention.inputs import Inputs, Mask, Result

# A block takes at least this many keys; with fewer, starting it and combining its result would cost more.
_SPLIT_KEYS = 256
_BLOCKS_OF_A_PROCESSOR = 2


def forward(inputs: Inputs, mask: Mask) -> Result:
    """See ``backends.py``."""
    query, device = inputs.query, inputs.query.device
    inputs = Inputs(*map(unit_columns, inputs))
    results = {
        "output": torch.empty(inputs.output_shape, dtype=query.dtype, device=device),
        "lse": torch.empty(query.shape[:-1], dtype=torch.float32, device=device),
    }
    splits = _splits(inputs)
    parts = {}
    if splits > 1:
        parts = {
            f"split_{name}": torch.empty(splits, *x.shape, dtype=torch.float32, device=device)
            for name, x in results.items()
        }
    tensors = {name: _vectors(x) for name, x in (inputs._asdict() | results | parts).items()}
    indices = ((address(x), strides) for x, strides in mask.per_anchor(inputs))
    _C.cuda.thought_attention(
        DTYPE_CODES[query.dtype], [*inputs.sizes, splits], (*indices, *mask.native_numbers), tensors,
        *launch_place(query),
    )  # fmt: skip
    return Result(**results)


def _vectors(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Return the address of a tensor [..., D] and its strides except that of D."""
    return address(tensor), tensor.stride()[:-1]


def _splits(inputs: Inputs) -> int:
    """Return into how many parts to split the keys so that all multiprocessors have work."""
    batch, _, kv_heads, num_anchors, steps, _, length, *_ = inputs.sizes
    blocks = batch * kv_heads * -(-num_anchors * steps * inputs.group // _C.cuda.TILE_ROWS)
    resident = _BLOCKS_OF_A_PROCESSOR * processors(inputs.query.device)
    return max(1, min(resident // blocks, -(-length // _SPLIT_KEYS)))
