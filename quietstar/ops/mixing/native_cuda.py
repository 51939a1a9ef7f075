"""The ``cuda`` backend: each logits row is read once per pass, and the mix never written unless it is the result."""

import torch
from torch import Tensor

from quietstar.ops._cuda import launch_place
from quietstar.ops._native import _C, DTYPE_CODES, address, as_rows


def mix(base: Tensor, thought: Tensor, mixing_weight: Tensor) -> Tensor:
    """(1 − w) · base + w · thought, computed in float32, in the dtype of the logits."""
    mixed = torch.empty_like(base, memory_format=torch.contiguous_format)
    rows = _Rows(base, thought, mixing_weight)
    _C.cuda.mix(rows.dtype, *rows.inputs, address(mixed), *rows.sizes)
    return mixed


def mix_backward(
    grad: Tensor, base: Tensor, thought: Tensor, mixing_weight: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of base, thought and, in float32, of the mixing weight; None where not needed."""
    rows = _Rows(base, thought, mixing_weight)
    d_base, d_thought = _gradients(base, needs)
    d_weight = base.new_empty(mixing_weight.shape, dtype=torch.float32) if needs[2] else None
    grad = as_rows(grad)
    _C.cuda.mix_backward(
        rows.dtype, address(grad), grad.stride(0), *rows.inputs, address(d_base), address(d_thought),
        address(d_weight), *rows.sizes,
    )  # fmt: skip
    return d_base, d_thought, d_weight


def cross_entropy(
    base: Tensor, thought: Tensor, mixing_weight: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nll, its slope by the mixing weight, largest mixed logit, log of the sum: as ``library.cross_entropy``."""
    rows = _Rows(base, thought, mixing_weight)
    results = tuple(base.new_empty(target.shape, dtype=torch.float32) for _ in range(4))
    target = target.contiguous()
    _C.cuda.mixed_cross_entropy(rows.dtype, *rows.inputs, address(target), *map(address, results), *rows.sizes)
    return results


def cross_entropy_backward(
    scale: Tensor,
    base: Tensor,
    thought: Tensor,
    mixing_weight: Tensor,
    target: Tensor,
    largest: Tensor,
    log_total: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of sum(scale · nll) by base and thought; scale [...] is 0 for rows without a gradient."""
    rows = _Rows(base, thought, mixing_weight)
    d_base, d_thought = _gradients(base, needs)
    held = [x.contiguous() for x in (scale, target, largest, log_total)]
    scale, *given = map(address, held)
    _C.cuda.mixed_cross_entropy_backward(
        rows.dtype, scale, *rows.inputs, *given, address(d_base), address(d_thought), *rows.sizes
    )
    return d_base, d_thought


class _Rows:
    """Logits [..., V] and mixing weight [...] as kernels take them."""

    def __init__(self, base: Tensor, thought: Tensor, mixing_weight: Tensor):
        self.held = as_rows(base), as_rows(thought), mixing_weight.to(torch.float32).contiguous()  # until the launch
        base, thought, mixing_weight = self.held
        self.dtype = DTYPE_CODES[base.dtype]
        self.inputs = (
            address(base), base.stride(0), address(thought), thought.stride(0), address(mixing_weight),
        )  # fmt: skip
        self.sizes = *base.shape, *launch_place(base)


def _gradients(base: Tensor, needs: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    needs_base, needs_thought = needs[:2]
    return (
        torch.empty_like(base, memory_format=torch.contiguous_format) if needs_base else None,
        torch.empty_like(base, memory_format=torch.contiguous_format) if needs_thought else None,
    )
