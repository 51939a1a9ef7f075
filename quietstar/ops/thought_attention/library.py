"""The ``torch`` backend: library flash attention on the base keys, merged with the thought keys by log-sum-exp.

Every query row sees two disjoint sets of keys: a prefix of the base keys, shared by all rows of an anchor, and the
few thought keys of its own anchor (the diagonal part). The base part is plain causal attention once steps and
repeated anchors are folded into heads, so a library kernel does it whenever the anchors are 0..n−1, each repeated
equally often, and neither window nor padding hides a key. Otherwise it is computed in blocks of anchors with at most
``SCORE_BYTES`` of scores at a time. Away from the CPU no value of ``anchors`` or ``key_start`` is read, because that
waits for the device: where they are given, blocks are computed, over all base keys.

Scores are in float32 or wider: those of float16 may not fit it before they are scaled.

Backward needs no merge: with the *merged* output and log-sum-exp, exp(score − lse) is the true probability of a base
key and rowsum(dO · O) the true correction, so the library's own backward is exact for the base part.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from quietstar.ops._precision import compute_dtype, widen
from quietstar.ops.thought_attention import flash
from quietstar.ops.thought_attention.reference import per_anchor

SCORE_BYTES = 32 * 2**20

# Queries in a block of the diagonal part on a CPU: with their scores and outputs they stay in the cache.
CACHE_BYTES = 2**21


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
    """Output [B, Hq, P, S, D] in the dtype of ``query`` and lse [B, Hq, P, S] in float32 (float64 for float64)."""
    base_output, base_lse = base_forward(query, key, value, anchors, key_start, window, scale)
    output, lse = torch.empty(query.shape, dtype=query.dtype, device=query.device), torch.empty_like(base_lse)
    for rows, own in _diagonal_blocks(query, thought_key):
        kv_heads = thought_key[own].shape[1]
        scores = _diagonal_scores(query[rows], thought_key[own], scale)
        block_base_lse = _group(base_lse[rows], kv_heads)
        block_lse = torch.logaddexp(block_base_lse, scores.logsumexp(dim=-1))
        probability = scores.sub_(block_lse.unsqueeze(-1)).exp_()
        share = (block_base_lse - block_lse).exp_().unsqueeze(-1)
        merged = (_group(base_output[rows], kv_heads) * share).add_(probability @ widen(thought_value[own]))
        output[rows], lse[rows] = _ungroup(merged, query), _ungroup(block_lse, query)
    blank_inactive(anchors, output, lse)
    return output, lse


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thought_key: Tensor,
    thought_value: Tensor,
    output: Tensor,
    lse: Tensor,
    anchors: Tensor | None,
    key_start: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, thought_key and thought_value, in that order."""
    hidden = inactive(anchors)
    if hidden is not None:  # rows of zeros have zeros for gradients, and add nothing to those of the base keys
        query, grad_output, thought_key, thought_value = (
            x.masked_fill(hidden.unsqueeze(-1), 0) for x in (query, grad_output, thought_key, thought_value)
        )
        grad_lse = None if grad_lse is None else grad_lse.masked_fill(hidden, 0)
    base = base_backward(grad_output, grad_lse, query, key, value, output, lse, anchors, key_start, window, scale)
    delta, lse = _delta(grad_output, grad_lse, output, lse), _divisor(lse)
    grad_query, grad_thought_key, grad_thought_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, thought_key, thought_value)
    )
    for rows, own in _diagonal_blocks(query, thought_key):
        kv_heads = thought_key[own].shape[1]
        scores = _diagonal_scores(query[rows], thought_key[own], scale)
        probability = scores.sub_(_group(lse[rows], kv_heads).unsqueeze(-1)).exp_()
        block_query, block_grad = (widen(_group(x[rows], kv_heads)) for x in (query, grad_output))
        grad_thought_value[own] = probability.mT @ block_grad
        grad_scores = (block_grad @ widen(thought_value[own]).mT).sub_(_group(delta[rows], kv_heads).unsqueeze(-1))
        grad_scores = grad_scores.mul_(probability).mul_(scale)
        grad_thought_key[own] = grad_scores.mT @ block_query
        grad_query[rows] = base[0][rows] + _ungroup(grad_scores @ widen(thought_key[own]), query)
    return grad_query, base[1], base[2], grad_thought_key, grad_thought_value


def base_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    anchors: Tensor | None,
    key_start: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the base keys alone: output [B, Hq, P, S, D], and lse [B, Hq, P, S] in float32 or wider.

    The output is in the dtype of ``query`` or wider. Rows that see no base key have lse −inf.
    """
    repeats = causal_repeats(anchors, key_start, window, scale, query, key)
    if repeats is not None:
        return flash.forward(query, key, value, repeats, scale)
    return _blocked_forward(query, key, value, anchors, key_start, window, scale)


def base_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    anchors: Tensor | None,
    key_start: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What reaches query, key and value through the base keys, given the *merged* output and lse."""
    # The library derives delta from the output alone: a gradient through lse has to take the blocked path.
    repeats = causal_repeats(anchors, key_start, window, scale, query, key) if grad_lse is None else None
    if repeats is not None:
        return flash.backward(grad_output, query, key, value, output, _divisor(lse), repeats, scale)
    delta = _delta(grad_output, grad_lse, output, lse)
    return _blocked_backward(grad_output, delta, query, key, value, _divisor(lse), anchors, key_start, window, scale)


def blank_inactive(anchors: Tensor | None, output: Tensor, lse: Tensor) -> None:
    """Give the rows of inactive anchors output 0 and lse −inf, in place."""
    hidden = inactive(anchors)
    if hidden is not None:
        output.masked_fill_(hidden.unsqueeze(-1), 0)
        lse.masked_fill_(hidden, -torch.inf)


def inactive(anchors: Tensor | None) -> Tensor | None:
    """Which anchors are inactive, bool [B or 1, 1, P, 1]; None if it is known that none is."""
    return None if anchors is None else _unless_none(_per_batch(anchors)[:, None, :, None] < 0)


def _unless_none(mask: Tensor) -> Tensor | None:
    """The mask, but None if it is known to be False: only the values of a CPU are there without waiting."""
    return None if mask.device.type == "cpu" and not mask.any() else mask


def _delta(grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor) -> Tensor:
    """rowsum(dO · O) − dLSE, [B, Hq, P, S] in the dtype of ``lse``."""
    delta = (grad_output.to(lse.dtype) * output).sum(dim=-1)
    return delta if grad_lse is None else delta - grad_lse


def _divisor(lse: Tensor) -> Tensor:
    """Lse such that exp(score − lse) is the probability, also for inactive rows, where it is 0."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def causal_repeats(
    anchors: Tensor | None, key_start: Tensor | None, window: int | None, scale: float, query: Tensor, key: Tensor
) -> int | None:
    """How often each of the anchors 0..n−1 is repeated if a library kernel can do the base part, else None.

    Reads the values of ``anchors`` and ``key_start`` on a CPU, and gives up on them elsewhere.
    """
    if not flash.supports(query, scale):
        return None
    if query.device.type != "cpu" and not (anchors is None and key_start is None):
        return None
    if anchors is None:
        repeats, positions = 1, key.shape[2]
    else:
        positions = int(anchors.max()) + 1
        if positions < 1 or anchors.shape[-1] % positions:
            return None
        repeats = anchors.shape[-1] // positions
        expected = torch.arange(positions, device=anchors.device, dtype=anchors.dtype).repeat_interleave(repeats)
        if not bool((anchors == expected).all()):
            return None
    if window is not None and window < positions:
        return None
    if key_start is not None and bool(key_start.any()):
        return None
    return repeats


def _diagonal_blocks(query: Tensor, thought_key: Tensor) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Blocks of the diagonal part: slices of [B, Hq, P, ...] and the matching ones of [B, Hkv, P, ...].

    On a CPU one key/value head and as many anchors as leave a block in the cache; elsewhere everything at once.
    """
    batch, query_heads, num_anchors, steps, head_size = query.shape
    kv_heads = thought_key.shape[1]
    if query.device.type != "cpu":
        yield (slice(None),) * 3, (slice(None),) * 3
        return
    group = query_heads // kv_heads
    size = max(1, CACHE_BYTES // (group * steps * head_size * query.element_size()))
    for b, head, start in itertools.product(range(batch), range(kv_heads), range(0, num_anchors, size)):
        anchors = slice(start, start + size)
        yield (slice(b, b + 1), slice(head * group, (head + 1) * group), anchors), (
            slice(b, b + 1), slice(head, head + 1), anchors,
        )  # fmt: skip


def _group(tensor: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, P, S, ...] -> [B, Hkv, P, G·S, ...]: all the rows that share an anchor's thought keys."""
    return tensor.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(3, 4)


def _ungroup(tensor: Tensor, query: Tensor) -> Tensor:
    """The inverse of :func:`_group`."""
    return tensor.unflatten(3, (-1, query.shape[3])).transpose(2, 3).flatten(1, 2)


def _per_batch(anchors: Tensor) -> Tensor:
    return anchors if anchors.dim() == 2 else anchors[None]


def _diagonal_scores(query: Tensor, thought_key: Tensor, scale: float) -> Tensor:
    """Scores [B, Hkv, P, G·S, T] of each row with its anchor's thought keys; later steps are −inf."""
    steps, thought_steps = query.shape[3], thought_key.shape[3]
    scores = (widen(_group(query, thought_key.shape[1])) @ widen(thought_key).mT).mul_(scale)
    if steps > 1:
        step = torch.arange(thought_steps, device=query.device)
        later = step > step[thought_steps - steps :, None]  # [S, T]
        scores.unflatten(3, (-1, steps)).masked_fill_(later, -torch.inf)
    return scores


class _Block:
    """A block of anchors and the base keys its rows may see."""

    def __init__(self, anchors: slice, keys: slice, visible: Tensor):
        self.anchors, self.keys = anchors, keys
        self.hidden = ~visible  # bool [B or 1, p, l]
        self.unseen = _unless_none(self.hidden.all(dim=1)[:, None, :, None])  # by all rows: [B or 1, 1, l, 1]

    def rows(self, tensor: Tensor, kv_heads: int) -> Tensor:
        """[B, Hq, P, S, ...] -> this block's rows as [B, Hkv, G·p·S, ...]."""
        return tensor[:, :, self.anchors].unflatten(1, (kv_heads, -1)).flatten(2, 4)

    def vectors(self, base: Tensor) -> Tensor:
        """Of keys or values [B, Hkv, L, D] those of this block in float32 or wider, zeros where no row sees them."""
        vectors = widen(base[:, :, self.keys])
        return vectors if self.unseen is None else vectors.masked_fill(self.unseen, 0)

    def masked(self, scores: Tensor, query: Tensor) -> Tensor:
        """Scores [B, Hkv, G·p·S, l] with hidden keys at −inf, in place."""
        hidden = self.hidden[:, None, None, :, None]
        scores.unflatten(2, (-1, hidden.shape[3], query.shape[3])).masked_fill_(hidden, -torch.inf)
        return scores


def _blocks(
    query: Tensor, key: Tensor, anchors: Tensor | None, key_start: Tensor | None, window: int | None
) -> Iterator[_Block]:
    batch, query_heads, num_anchors, steps, _ = query.shape
    length = key.shape[2]
    readable = query.device.type == "cpu"
    given = anchors is not None
    anchors = _per_batch(anchors) if given else torch.arange(length, device=query.device)[None]
    starts = None if key_start is None else per_anchor(key_start).expand(-1, num_anchors)
    size = max(1, SCORE_BYTES // (4 * batch * query_heads * steps * length))
    for start in range(0, num_anchors, size):
        block = anchors[:, start : start + size]
        low, high = 0, length - 1
        if not given:
            low, high = start, min(start + size, length) - 1
        elif readable:
            low, high = int(block.clamp_min(0).min()), int(block.max())
        block_starts = None if starts is None else starts[:, start : start + size]
        first_key = int(block_starts.min()) if readable and block_starts is not None else 0
        keys = slice(first_key if window is None else max(first_key, low - window + 1), max(high + 1, first_key))
        position = torch.arange(keys.start, keys.stop, device=query.device)
        visible = position <= block[..., None]
        if window is not None:
            visible &= block[..., None] - position < window
        if block_starts is not None:
            visible = visible & (position >= block_starts[..., None])
        yield _Block(slice(start, start + size), keys, visible)


def _blocked_forward(query, key, value, anchors, key_start, window, scale) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(query.dtype)
    heads = key.shape[1]
    output = torch.empty(query.shape, dtype=dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=dtype, device=query.device)
    for block in _blocks(query, key, anchors, key_start, window):
        rows = widen(block.rows(query, heads)).mul(scale)
        scores = block.masked(rows @ block.vectors(key).mT, query)
        block_lse = scores.logsumexp(dim=-1, keepdim=True)
        probability = scores.sub_(block_lse.masked_fill(block_lse == -torch.inf, 0)).exp_()
        block_output = probability @ block.vectors(value)
        shape = output[:, :, block.anchors].shape
        output[:, :, block.anchors] = block_output.view(shape)
        lse[:, :, block.anchors] = block_lse.view(shape[:-1])
    return output, lse


def _blocked_backward(
    grad_output, delta, query, key, value, lse, anchors, key_start, window, scale
) -> tuple[Tensor, Tensor, Tensor]:
    heads = key.shape[1]
    grad_query, grad_key, grad_value = (
        torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (query, key, value)
    )
    for block in _blocks(query, key, anchors, key_start, window):
        rows, grad_rows = (widen(block.rows(x, heads)) for x in (query, grad_output))
        keys, values = block.vectors(key), block.vectors(value)
        scores = block.masked((rows @ keys.mT).mul_(scale), query)
        probability = scores.sub_(block.rows(lse, heads).unsqueeze(-1)).exp_()
        grad_value[:, :, block.keys] += probability.mT @ grad_rows
        grad_scores = (grad_rows @ values.mT).sub_(block.rows(delta, heads).unsqueeze(-1))
        grad_scores.mul_(probability).mul_(scale)
        grad_key[:, :, block.keys] += grad_scores.mT @ rows
        grad_query[:, :, block.anchors] = (grad_scores @ keys).view(grad_query[:, :, block.anchors].shape)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
