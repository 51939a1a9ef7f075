"""Row kernel of the ``torch`` backend: library calls that each pass over the chunk in place.

Five passes over n·V·4 bytes in place of one, yet little next to the matmuls: at V = 32002, H = 512 a row takes one CPU
core 64 µs here and 1400 µs there. Cut into blocks that fit a cache it would be 53 µs, but on a busy machine far more:
every parallel call waits for the slowest core, so there should be few. The library's softmax would be three of the
passes in one and save about 10 µs, but it first copies rows that have a gap between them, as those of the chunk have,
and then takes several times as long as all of this.

A cap and an entropy need one more tensor of the size of the logits each. With them, blocks it is.
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
    """Nll and entropy of every row and, over the logits, its gradient: see ``.chunks.RowKernel``."""
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
    """Fill nll and entropy, and with scales the logits with their gradient. All but the logits are [n, 1]."""
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
        terms = torch.special.xlogy(logits, logits)  # z eᶻ, of the differences z to the largest; 0 for −∞
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
    logits.scatter_add_(1, target, -scale)  # p − 1, formed before any rounding to a narrower dtype
    if slope is not None:
        logits.mul_(slope)


solve_chunk = chunk_solver(cross_entropy_rows)
