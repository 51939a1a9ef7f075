"""The soft cap on logits, in Triton."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def capped(logits, cap):
    """Compute cap · tanh(logit / cap), but keep infinities; near 0, tanh is Cephes' polynomial (Moshier)."""
    x = logits / cap
    square, size = x * x, tl.abs(x)
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    tanh = tl.where(size < 0.625, near, tl.where(x < 0, -far, far))
    return tl.where(tl.abs(logits) == float("inf"), logits, cap * tanh)


@triton.jit
def cap_kernel(logits, cap, size, BLOCK: tl.constexpr):
    """Cap logits in place. Grid: blocks of the ``size`` logits."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(logits + place, capped(tl.load(logits + place, mask=place < size), cap), mask=place < size)


def cap_logits_(logits: Tensor, softcap: float) -> None:
    """Cap contiguous logits in place; moves 8 bytes of memory per logit."""
    size = logits.numel()
    # Fixed, so that results do not depend on Triton's default.
    cap_kernel[(triton.cdiv(size, _BLOCK),)](logits, softcap, size, BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=False)
