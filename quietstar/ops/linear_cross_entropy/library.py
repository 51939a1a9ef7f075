"""Row kernel of the ``torch`` backend: elementwise library calls over blocks of rows that stay in the cache."""

import torch
from torch import Tensor

from quietstar.ops._rows import BLOCK_BYTES, rows_within, slices


def cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    temperature: float,
    suppress: Tensor | None,
    gradient_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Nll of every row and, over the logits, its gradient: see :class:`.chunks.RowKernel`."""
    rows, vocabulary = logits.shape
    nll = logits.new_empty(rows)
    for part in slices(rows, rows_within(BLOCK_BYTES, vocabulary * logits.element_size(), logits.device)):
        _block(logits[part], target[part, None], None if scale is None else scale[part, None], temperature, suppress,
               nll[part])  # fmt: skip
    return nll, None if scale is None else logits.to(gradient_dtype)


def _block(
    logits: Tensor, target: Tensor, scale: Tensor | None, temperature: float, suppress: Tensor | None, nll: Tensor
) -> None:
    """One block: nll is filled, logits become the gradient. target and scale are columns."""
    if suppress is not None:
        logits.index_fill_(1, suppress, float("-inf"))
    logits.sub_(logits.amax(dim=1, keepdim=True))
    if temperature != 1:
        logits.div_(temperature)
    target_logit = logits.gather(1, target)
    total = logits.exp_().sum(dim=1, keepdim=True)
    torch.sub(total.log(), target_logit, out=nll[:, None])
    if scale is not None:
        scale = scale / temperature
        logits.mul_(scale / total)
        logits.scatter_add_(1, target, -scale)
