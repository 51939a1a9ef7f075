"""The row kernel of the ``torch`` backend: library calls, each of which passes over the chunk in place.

It makes five passes over n·V·4 bytes where a fused kernel makes one, but this is little next to the matmuls: at
V = 32002, H = 512, a row takes one CPU core 64 µs here and 1400 µs there. Working in blocks that fit a cache would take
53 µs, but far more on a busy machine: every parallel call waits for the slowest core, so there should be few calls. The
library's softmax would combine three of the passes and save about 10 µs, but it first copies rows with a gap between
them, which the rows of a chunk have, and then takes several times as long as all passes here.

A cap and an entropy each need one more tensor of the size of the logits, so with them the work is done in blocks.
"""

import torch
from torch import Tensor

from quietstar.ops._rows import BLOCK_BYTES, rows_within, slices
from quietstar.ops._vocabulary import Softmax, cap_logits_
from quietstar.ops.linear_cross_entropy.chunks import chunk_solver, scale_
from quietstar.ops.linear_cross_entropy.inputs import MixedHidden, RowResult, Scales

__all__ = ["MixedHidden", "scale_", "solve_chunk"]


def cross_entropy_rows(
    logits: Tensor,
    softmax: Softmax,
    target: Tensor,
    scales: Scales | None,
    entropy: bool,
    gradient_dtype: torch.dtype,
) -> RowResult:
    """Compute nll and entropy of every row and overwrite its logits with their gradient: see ``.chunks.RowKernel``."""
    if softmax.suppress is not None:
        logits.index_fill_(1, softmax.suppress, float("-inf"))
    rows = len(logits)
    nll, entropies = logits.new_empty(rows), logits.new_empty(rows) if entropy else None
    in_place = softmax.softcap is None and not entropy
    step = max(1, rows) if in_place else rows_within(BLOCK_BYTES, logits[:1].nbytes, logits.device)
    for part in slices(rows, step):
        of_part = None if scales is None else scales.each(lambda scale, part=part: scale[part, None])
        _solve(
            logits[part], softmax, target[part, None], of_part, nll[part, None],
            None if entropies is None else entropies[part, None],
        )  # fmt: skip
    return RowResult(nll, entropies, None if scales is None else logits.to(gradient_dtype))


def _solve(
    logits: Tensor, softmax: Softmax, target: Tensor, scales: Scales | None, nll: Tensor, entropy: Tensor | None
) -> None:
    """Fill nll and entropy and, if there are scales, replace the logits by their gradient. Other tensors are [n, 1]."""
    slope = None
    if softmax.softcap is not None:
        cap_logits_(logits, softmax.softcap)
        if scales is not None:  # 0 for infinities
            slope = (logits / softmax.softcap).square_().neg_().add_(1).clamp_min_(0)
    logits.sub_(logits.amax(dim=1, keepdim=True))
    if softmax.temperature != 1:
        logits.div_(softmax.temperature)
    target_logit = logits.gather(1, target)
    total = logits.exp_().sum(dim=1, keepdim=True)
    torch.sub(total.log(), target_logit, out=nll)
    if entropy is not None:
        terms = torch.special.xlogy(logits, logits)  # z eᶻ, where z is the difference to the largest; 0 for −∞
        mean = terms.sum(dim=1, keepdim=True).div_(total)
        torch.sub(total.log(), mean, out=entropy)
    if scales is None:
        return
    scale = scales.nll / softmax.temperature
    if scales.entropy is None:
        logits.mul_(scale / total)
    else:  # p (scale + entropy_scale (z − mean))
        entropy_scale = scales.entropy / softmax.temperature
        logits.mul_((scale - entropy_scale * mean) / total).addcmul_(terms, entropy_scale / total)
    logits.scatter_add_(1, target, -scale)  # p − 1, computed before any rounding to a narrower dtype
    if slope is not None:
        logits.mul_(slope)


solve_chunk = chunk_solver(cross_entropy_rows)
