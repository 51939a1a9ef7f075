"""What a call of thought attention has to do at the least: the floor that kernels are measured against."""

from typing import NamedTuple

import torch
from torch import Tensor

from quietstar.ops.thought_attention.reference import per_anchor


class Cost(NamedTuple):
    """Of one pass."""

    flops: int
    """Multiplications and additions in matrix products, of visible (query, key) pairs only."""
    bytes: int
    """Read or written if every input is read once and every result written once."""


class CallCost(NamedTuple):
    """Of a call and of its backward, without each other."""

    forward: Cost
    backward: Cost


def thought_attention_cost(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thought_key: Tensor,
    thought_value: Tensor,
    *,
    anchors: Tensor | None = None,
    key_start: Tensor | None = None,
    window: int | None = None,
) -> CallCost:
    """FLOPs and least bytes of ``thought_attention`` with the same arguments.

    A visible pair of query and key takes two products of D numbers forward (query · key, probability · value) and five
    backward (again query · key, then one each for the gradients of probability, query, key and value): 4·D and 10·D
    FLOPs, as FlashAttention counts (arXiv 2307.08691, section 4.1). A kernel that computes anything twice does more
    than that.

    The least bytes assume a cache that holds everything. Of base keys and values those count that some query sees, of
    inactive anchors only what is written for them: zeros. The forward writes output and lse; the backward reads both,
    the gradient of the output and all inputs, and writes five gradients.

    Args:
        query, key, value, thought_key, thought_value: shapes and dtypes count, values do not: meta tensors will do.
        anchors, key_start, window: as in ``thought_attention``; the values of the tensors are read.
    """
    batch, query_heads, num_anchors, steps, head_size = query.shape
    kv_heads, length = key.shape[1:3]
    thought_steps = thought_key.shape[3]

    last = torch.arange(length) if anchors is None else anchors.cpu().long()
    last = last.expand(batch, num_anchors)
    first = torch.zeros(batch, 1, dtype=torch.int64) if key_start is None else per_anchor(key_start).cpu().long()
    first = first if window is None else first.maximum(last - window + 1)
    base_pairs = (last - first + 1).clamp_min(0)  # [B, P], of one step and head
    active = last >= 0
    own_pairs = steps * thought_steps - steps * (steps - 1) // 2  # step t sees t + 1, the queries are the last S of T
    pairs = query_heads * (steps * int(base_pairs.sum()) + own_pairs * int(active.sum()))

    # Base keys that some anchor sees: +1 where an anchor's range begins, −1 behind its end.
    ends = torch.zeros(batch, length + 1, dtype=torch.int64)
    one = torch.ones_like(last)
    ends.scatter_add_(1, first.minimum(last + 1), one).scatter_add_(1, last + 1, -one)
    seen_keys = int((ends.cumsum(1) > 0).sum())

    size = query.element_size()
    vector = head_size * size
    rows = query_heads * steps * batch * num_anchors
    active_rows = query_heads * steps * int(active.sum())
    keys = kv_heads * (seen_keys + thought_steps * int(active.sum()))
    all_keys = kv_heads * batch * (length + thought_steps * num_anchors)
    log_sum = torch.finfo(torch.promote_types(query.dtype, torch.float32)).bits // 8
    forward = active_rows * vector + 2 * keys * vector + rows * (vector + log_sum)
    backward = active_rows * (3 * vector + log_sum) + 2 * keys * vector + (rows + 2 * all_keys) * vector
    return CallCost(Cost(4 * head_size * pairs, forward), Cost(10 * head_size * pairs, backward))
