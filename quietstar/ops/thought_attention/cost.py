"""The minimal cost of a call of thought attention, the lower bound that kernels are measured against."""

from typing import NamedTuple

import torch
from torch import Tensor

from quietstar.ops.thought_attention.inputs import Inputs, Mask


class Cost(NamedTuple):
    """The cost of one pass."""

    flops: int
    """Multiplications and additions of the matrix products, for visible (query, key) pairs only."""
    bytes: int
    """Bytes moved if every input is read once and every result is written once."""


class CallCost(NamedTuple):
    """The costs of the forward and of the backward, each by itself."""

    forward: Cost
    backward: Cost


def thought_attention_cost(
    query: Tensor, key: Tensor, value: Tensor, thought_key: Tensor, thought_value: Tensor, **options: object
) -> CallCost:
    """Count the FLOPs and the minimal bytes of ``thought_attention`` with the same arguments.

    A visible pair of query and key takes two products forward (query · key of D numbers, probability · value of Dv) and
    five backward (query · key again, then one each for the gradients of probability, query, key and value). That is
    2·D + 2·Dv and 6·D + 4·Dv FLOPs, as FlashAttention counts them (arXiv 2307.08691, section 4.1). A kernel that
    recomputes anything does more.

    The byte count assumes a cache that holds everything. Keys and values count if some query sees them, queries if
    they see a key; of all others, only the zeros written for them count. The forward writes output and lse. The
    backward reads both, the gradient of the output and all inputs, and writes five gradients.

    Args:
        query, key, value, thought_key, thought_value: only shapes and dtypes matter, so they may be meta tensors.
        options: ``anchors``, ``key_start``, ``thought_lengths``, ``window``, ``window_from`` and ``causal`` as in
            ``thought_attention``. The values of these tensors are read.
    """
    inputs = Inputs(*(torch.empty(x.shape, device="meta") for x in (query, key, value, thought_key, thought_value)))
    options = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in options.items()}
    mask = Mask.of(inputs, **options)
    batch, query_heads, num_anchors, steps, head_size = query.shape
    kv_heads, length, value_size = key.shape[1], key.shape[2], value.shape[-1]

    # What the queries of every step see: base keys first … last, int64 [B, P, S], and keys of their own thought, bool
    # [B, P, S, T], or [1, 1, S, T] if it is the same for all active anchors.
    last = mask.anchors_in(length, torch.device("cpu")).expand(batch, num_anchors)[:, :, None].expand(-1, -1, steps)
    active = last[:, :, 0] >= 0
    lengths = torch.full((1, 1), inputs.thought_steps) if mask.thought_lengths is None else mask.thought_lengths
    step = torch.arange(inputs.thought_steps - steps, inputs.thought_steps)
    exists = active[:, :, None] & (step < lengths[:, :, None])
    first = torch.zeros_like(last)
    if mask.key_start is not None:
        first = first.maximum(mask.key_start[:, :, None])
    if mask.window is not None:
        offset = mask.window_offset(steps, inputs.thought_steps)
        moved = torch.arange(offset, offset + steps) if mask.window_from_step else 0
        first = first.maximum(last + moved - mask.window + 1)
    base_pairs = torch.where(exists, last - first + 1, 0).clamp_min(0)
    own = mask.sees_thought(lengths, inputs, torch.device("cpu"))
    pairs = query_heads * int(base_pairs.sum() + (own.sum(dim=(2, 3)) * active).sum())

    # Base keys that some query sees: +1 where a query's range begins, −1 after its end.
    begin, end = torch.where(base_pairs > 0, first, 0).flatten(1), torch.where(base_pairs > 0, last + 1, 0).flatten(1)
    ends = torch.zeros(batch, length + 1, dtype=torch.int64)
    ends.scatter_add_(1, begin, torch.ones_like(begin)).scatter_add_(1, end, -torch.ones_like(end))
    keys = kv_heads * int((ends.cumsum(1) > 0).sum() + (own.any(dim=2).sum(dim=2) * active).sum())

    size = query.element_size()
    active_rows = query_heads * int(exists.sum())
    rows = query_heads * steps * batch * num_anchors
    all_keys = kv_heads * batch * (length + inputs.thought_steps * num_anchors)
    both = (head_size + value_size) * size  # a query and its output, or a key and its value
    log_sum = torch.finfo(torch.promote_types(query.dtype, torch.float32)).bits // 8
    forward = active_rows * head_size * size + keys * both + rows * (value_size * size + log_sum)
    backward = active_rows * (both + value_size * size + log_sum) + (keys + all_keys) * both + rows * head_size * size
    flops = 2 * (head_size + value_size) * pairs, (6 * head_size + 4 * value_size) * pairs
    return CallCost(Cost(flops[0], forward), Cost(flops[1], backward))
