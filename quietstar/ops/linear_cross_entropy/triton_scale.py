"""Scaling of gradients by the incoming gradient; if that is 1, as for an unchanged loss, no memory is moved.

Only the device knows the factor. A program reads it, 4 bytes, and returns if it is 1. At 2048 x 4096 x 32000 this means
1,100 programs instead of moving 4 bytes for each of 139 M elements in half precision, 0.12 ms at 4.8 TB/s.
"""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _STEPS = 8192, 16


@triton.jit
def scale_kernel(gradient, factor, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Multiply in place, in float32. Grid: STEPS blocks of the ``size`` elements each."""
    by = tl.load(factor).to(tl.float32)
    if by != 1:
        first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
        for step in range(STEPS):
            place = first + step * BLOCK + tl.arange(0, BLOCK)
            scaled = tl.load(gradient + place, mask=place < size, other=0.0) * by
            tl.store(gradient + place, scaled, mask=place < size)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous ``gradient`` in place by the scalar tensor ``factor`` on its device, without waiting."""
    size = gradient.numel()
    if size:
        grid = (triton.cdiv(size, _BLOCK * _STEPS),)
        scale_kernel[grid](gradient, factor, size, BLOCK=_BLOCK, STEPS=_STEPS, num_warps=8, enable_fp_fusion=False)
