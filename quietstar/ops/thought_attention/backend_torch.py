"""The ``torch`` backend: library flash attention on the base keys, merged with the thought keys by log-sum-exp.

Every query row sees two disjoint sets of keys: a prefix of the base keys, shared by all rows of an anchor, and the
few thought keys of its own anchor (the diagonal part). The base part is plain causal attention once steps and
repeated anchors are folded into heads. So a library kernel computes it if the anchors are 0..n−1, each repeated
equally often, and neither window nor padding hides a key. Otherwise it is computed in blocks of anchors with at most
``SCORE_BYTES`` of scores at a time. On devices other than the CPU, values of ``anchors`` and ``key_start`` are not
read, since that would wait for the device: if they are given, the blocks cover all base keys.

Scores are in float32 or wider, since unscaled products of float16 may overflow it.

The backward needs no merge: with the *merged* output and log-sum-exp, exp(score − lse) is the true probability of a
base key and rowsum(dO · O) the true correction, so the library's own backward is exact for the base part.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from quietstar.ops._precision import compute_dtype, widen
from quietstar.ops.thought_attention import flash
from quietstar.ops.thought_attention.inputs import Inputs, Mask, Result, ResultGradients

SCORE_BYTES = 32 * 2**20

# Queries in a block of the diagonal part on a CPU, so few that with their scores and outputs they stay in the cache.
CACHE_BYTES = 2**21


def forward(inputs: Inputs, mask: Mask) -> Result:
    """See ``backends.py``."""
    query, thought_key, thought_value = inputs.query, inputs.thought_key, inputs.thought_value
    base_output, base_lse = base_forward(inputs, mask)
    output = torch.empty(inputs.output_shape, dtype=query.dtype, device=query.device)
    lse = torch.empty_like(base_lse)
    for block in _diagonal_blocks(inputs, mask):
        rows, kv_heads = block.rows, block.kv_heads
        scores, _ = block.scores(query, thought_key, mask)
        block_base_lse = _group(base_lse[rows], kv_heads)
        block_lse = torch.logaddexp(block_base_lse, scores.logsumexp(dim=-1))
        probability = scores.sub_(block_lse.unsqueeze(-1)).exp_()
        share = (block_base_lse - block_lse).exp_().unsqueeze(-1)
        merged = (_group(base_output[rows], kv_heads) * share).add_(probability @ block.vectors(thought_value))
        output[rows], lse[rows] = _ungroup(merged, query), _ungroup(block_lse, query)
    blank_inactive(inputs, mask, output, lse)
    return Result(output, lse)


def backward(gradients: ResultGradients, inputs: Inputs, mask: Mask, result: Result) -> Inputs:
    """See ``backends.py``."""
    hidden = inactive(inputs, mask)
    if hidden is not None:  # zeroed rows get gradient 0 and add nothing to those of the keys
        grad_output, grad_lse = gradients
        grad_output = grad_output.masked_fill(hidden.unsqueeze(-1), 0)
        gradients = ResultGradients(grad_output, None if grad_lse is None else grad_lse.masked_fill(hidden, 0))
        inputs = inputs._replace(query=inputs.query.masked_fill(hidden.unsqueeze(-1), 0))
    query, _, _, thought_key, thought_value = inputs
    base = base_backward(gradients, inputs, mask, result)
    delta, lse = _delta(gradients, result), _divisor(result.lse)
    grad_query, grad_thought_key, grad_thought_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, thought_key, thought_value)
    )
    for block in _diagonal_blocks(inputs, mask):
        rows, own, kv_heads = block.rows, block.own, block.kv_heads
        scores, slope = block.scores(query, thought_key, mask)
        probability = scores.sub_(_group(lse[rows], kv_heads).unsqueeze(-1)).exp_()
        block_query, block_grad = (widen(_group(x[rows], kv_heads)) for x in (query, gradients.output))
        grad_thought_value[own] = probability.mT @ block_grad
        grad_scores = block_grad @ block.vectors(thought_value).mT
        grad_scores = grad_scores.sub_(_group(delta[rows], kv_heads).unsqueeze(-1)).mul_(probability).mul_(slope)
        grad_thought_key[own] = grad_scores.mT @ block_query
        grad_query[rows] = base[0][rows] + _ungroup(grad_scores @ block.vectors(thought_key), query)
    return Inputs(grad_query, base[1], base[2], grad_thought_key, grad_thought_value)


def base_forward(inputs: Inputs, mask: Mask) -> tuple[Tensor, Tensor]:
    """Compute attention over the base keys alone: output [B, Hq, P, S, Dv], lse [B, Hq, P, S] in float32 or wider.

    The output is in the dtype of ``query`` or wider. Rows that see no base key have lse −inf.
    """
    mask = mask.without_idle_anchors(inputs)
    repeats = causal_repeats(inputs, mask)
    if repeats is not None:
        return flash.forward(*inputs[:3], repeats, mask.scale)
    return _blocked_forward(inputs, mask)


def base_backward(
    gradients: ResultGradients, inputs: Inputs, mask: Mask, result: Result
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of query, key and value through the base keys, given the *merged* output and lse."""
    mask = mask.without_idle_anchors(inputs)
    # The library computes delta from the output alone, so a gradient through lse needs the blocked path.
    repeats = causal_repeats(inputs, mask) if gradients.lse is None else None
    if repeats is not None:
        output, lse = result
        return flash.backward(gradients.output, *inputs[:3], output, _divisor(lse), repeats, mask.scale)
    return _blocked_backward(gradients, inputs, mask, result)


def blank_inactive(inputs: Inputs, mask: Mask, output: Tensor, lse: Tensor) -> None:
    """Set the output to 0 and the lse to −inf, in place, for rows that see nothing."""
    hidden = inactive(inputs, mask)
    if hidden is not None:
        output.masked_fill_(hidden.unsqueeze(-1), 0)
        lse.masked_fill_(hidden, -torch.inf)


def inactive(inputs: Inputs, mask: Mask) -> Tensor | None:
    """Return which rows see nothing, bool [1 or B, 1, P, 1 or S]; None if there are known to be none."""
    hidden = mask.inactive(inputs)
    return None if hidden is None else _unless_none(hidden[:, None])


def _unless_none(mask: Tensor) -> Tensor | None:
    """Return the mask, or None if it is known to be all False (only values on a CPU can be read without waiting)."""
    return None if mask.device.type == "cpu" and not mask.any() else mask


def _delta(gradients: ResultGradients, result: Result) -> Tensor:
    """Compute rowsum(dO · O) − dLSE, [B, Hq, P, S] in the dtype of the lse."""
    delta = (gradients.output.to(result.lse.dtype) * result.output).sum(dim=-1)
    return delta if gradients.lse is None else delta - gradients.lse


def _divisor(lse: Tensor) -> Tensor:
    """Return lse such that exp(score − lse) is the probability also for inactive rows, where it is 0."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def causal_repeats(inputs: Inputs, mask: Mask) -> int | None:
    """Return how often each of the anchors 0..n−1 is repeated if a library kernel can compute the base part, else None.

    Reads the values of index tensors on a CPU; elsewhere returns None if there are index tensors.
    """
    query, key, value = inputs[:3]
    anchors, key_start = mask.anchors, mask.key_start
    if mask.softcap is not None or value.shape[-1] != query.shape[-1] or not flash.supports(query, mask.scale):
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
        expected = torch.arange(positions, device=anchors.device).repeat_interleave(repeats)
        if not bool((anchors == expected).all()):
            return None
    if mask.window is not None and mask.window < positions + (inputs.thought_steps if mask.window_from_step else 0):
        return None
    if key_start is not None and bool(key_start.any()):
        return None
    return repeats


class _DiagonalBlock:
    """Some anchors of some key/value heads, and the thought keys of these anchors."""

    def __init__(self, batch: slice, heads: slice, anchors: slice, inputs: Inputs, mask: Mask):
        group = inputs.group
        self.rows = batch, slice(heads.start * group, heads.stop * group), anchors  # index into [B, Hq, P, ...]
        self.own = batch, heads, anchors  # index into [B, Hkv, P, ...]
        self.kv_heads = heads.stop - heads.start
        lengths = mask.thought_lengths
        if lengths is not None:
            lengths = lengths[batch if len(lengths) > 1 else slice(None), anchors]
        visible = mask.sees_thought(lengths, inputs, inputs.query.device)  # [1 or b, 1 or p, S, T]
        self.hidden = _unless_none(~visible[:, None, :, None])
        # Keys that no row sees, including those of inactive anchors, may be NaN.
        unseen = ~visible.any(dim=2)
        if mask.anchors is not None:
            unseen = unseen | (mask.anchors[batch if len(mask.anchors) > 1 else slice(None), anchors, None] < 0)
        self.unseen = _unless_none(unseen[:, None, :, :, None])

    def vectors(self, thought: Tensor) -> Tensor:
        """Select this block's thought keys or values from [B, Hkv, P, T, ...], in float32 or wider, 0 where unseen."""
        vectors = widen(thought[self.own])
        return vectors if self.unseen is None else vectors.masked_fill(self.unseen, 0)

    def scores(self, query: Tensor, thought_key: Tensor, mask: Mask) -> tuple[Tensor, Tensor | float]:
        """Compute scores [b, heads, p, G·S, T], −inf where hidden, and their derivative w.r.t. query · key."""
        scores = widen(_group(query[self.rows], self.kv_heads)) @ self.vectors(thought_key).mT
        scores, slope = scaled(scores, mask)
        if self.hidden is not None:
            scores.unflatten(3, (-1, query.shape[3])).masked_fill_(self.hidden, -torch.inf)
        return scores, slope


def scaled(products: Tensor, mask: Mask) -> tuple[Tensor, Tensor | float]:
    """Turn products of query and key into scores, in place, and return also the derivative w.r.t. these products."""
    scores = products.mul_(mask.scale)
    if mask.softcap is None:
        return scores, mask.scale
    curve = scores.div_(mask.softcap).tanh_()
    slope = curve.square().neg_().add_(1).mul_(mask.scale)
    return curve.mul_(mask.softcap), slope


def _diagonal_blocks(inputs: Inputs, mask: Mask) -> Iterator[_DiagonalBlock]:
    """Yield blocks: on a CPU one key/value head and as many anchors as fit the cache; elsewhere everything at once."""
    query = inputs.query
    batch, _, num_anchors, steps, head_size = query.shape
    kv_heads = inputs.key.shape[1]
    if query.device.type != "cpu":
        yield _DiagonalBlock(slice(0, batch), slice(0, kv_heads), slice(0, num_anchors), inputs, mask)
        return
    size = max(1, CACHE_BYTES // (inputs.group * steps * head_size * query.element_size()))
    for b, head, start in itertools.product(range(batch), range(kv_heads), range(0, num_anchors, size)):
        yield _DiagonalBlock(slice(b, b + 1), slice(head, head + 1), slice(start, start + size), inputs, mask)


def _group(tensor: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, P, S, ...] -> [B, Hkv, P, G·S, ...], which groups all rows that share an anchor's thought keys."""
    return tensor.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(3, 4)


def _ungroup(tensor: Tensor, query: Tensor) -> Tensor:
    """The inverse of ``_group``."""
    return tensor.unflatten(3, (-1, query.shape[3])).transpose(2, 3).flatten(1, 2)


class _Block:
    """A block of anchors and the base keys its rows may see."""

    def __init__(self, anchors: slice, keys: slice, visible: Tensor):
        self.anchors, self.keys = anchors, keys
        self.hidden = ~visible  # bool [B or 1, p, S or 1, l]
        self.unseen = _unless_none(self.hidden.flatten(1, 2).all(dim=1)[:, None, :, None])  # keys that no row sees

    def rows(self, tensor: Tensor, kv_heads: int) -> Tensor:
        """Select this block's rows from [B, Hq, P, S, ...] as [B, Hkv, G·p·S, ...]."""
        return tensor[:, :, self.anchors].unflatten(1, (kv_heads, -1)).flatten(2, 4)

    def vectors(self, base: Tensor) -> Tensor:
        """Select this block's keys or values from [B, Hkv, L, ...], in float32 or wider, 0 where no row sees them."""
        vectors = widen(base[:, :, self.keys])
        return vectors if self.unseen is None else vectors.masked_fill(self.unseen, 0)

    def scores(self, rows: Tensor, keys: Tensor, steps: int, mask: Mask) -> tuple[Tensor, Tensor | float]:
        """Compute scores [B, Hkv, G·p·S, l], −inf where hidden, and their derivative w.r.t. query · key."""
        scores, slope = scaled(rows @ keys.mT, mask)
        hidden = self.hidden[:, None, None]
        scores.unflatten(2, (-1, hidden.shape[3], steps)).masked_fill_(hidden, -torch.inf)
        return scores, slope


def _blocks(inputs: Inputs, mask: Mask) -> Iterator[_Block]:
    query = inputs.query
    batch, query_heads, num_anchors, steps, _ = query.shape
    length = inputs.key.shape[2]
    readable = query.device.type == "cpu"
    anchors = mask.anchors_in(length, query.device)
    starts = None if mask.key_start is None else mask.key_start.expand(-1, num_anchors)
    size = max(1, SCORE_BYTES // (4 * batch * query_heads * steps * length))
    for start in range(0, num_anchors, size):
        block = anchors[:, start : start + size]
        low, high = 0, length - 1
        if mask.anchors is None:
            low, high = start, min(start + size, length) - 1
        elif readable:
            low, high = int(block.clamp_min(0).min()), int(block.max())
        block_starts = None if starts is None else starts[:, start : start + size]
        first_key = int(block_starts.min()) if readable and block_starts is not None else 0
        if mask.window is not None:
            first_key = max(first_key, low + mask.window_offset(steps, inputs.thought_steps) - mask.window + 1)
        keys = slice(first_key, max(high + 1, first_key))
        position = torch.arange(keys.start, keys.stop, device=query.device)
        yield _Block(slice(start, start + size), keys, mask.sees_base(block, block_starts, position, inputs))


def _blocked_forward(inputs: Inputs, mask: Mask) -> tuple[Tensor, Tensor]:
    query, key, value = inputs[:3]
    dtype, heads = compute_dtype(query.dtype), key.shape[1]
    output = torch.empty(inputs.output_shape, dtype=dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=dtype, device=query.device)
    for block in _blocks(inputs, mask):
        scores, _ = block.scores(widen(block.rows(query, heads)), block.vectors(key), inputs.steps, mask)
        block_lse = scores.logsumexp(dim=-1, keepdim=True)
        probability = scores.sub_(block_lse.masked_fill(block_lse == -torch.inf, 0)).exp_()
        block_output = probability @ block.vectors(value)
        shape = output[:, :, block.anchors].shape
        output[:, :, block.anchors] = block_output.view(shape)
        lse[:, :, block.anchors] = block_lse.view(shape[:-1])
    return output, lse


def _blocked_backward(
    gradients: ResultGradients, inputs: Inputs, mask: Mask, result: Result
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query, key, value = inputs[:3]
    heads, delta, lse = key.shape[1], _delta(gradients, result), _divisor(result.lse)
    grad_query, grad_key, grad_value = (
        torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (query, key, value)
    )
    for block in _blocks(inputs, mask):
        rows, grad_rows = (widen(block.rows(x, heads)) for x in (query, gradients.output))
        keys, values = block.vectors(key), block.vectors(value)
        scores, slope = block.scores(rows, keys, inputs.steps, mask)
        probability = scores.sub_(block.rows(lse, heads).unsqueeze(-1)).exp_()
        grad_value[:, :, block.keys] += probability.mT @ grad_rows
        grad_scores = (grad_rows @ values.mT).sub_(block.rows(delta, heads).unsqueeze(-1))
        grad_scores.mul_(probability).mul_(slope)
        grad_key[:, :, block.keys] += grad_scores.mT @ rows
        grad_query[:, :, block.anchors] = (grad_scores @ keys).view(grad_query[:, :, block.anchors].shape)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
