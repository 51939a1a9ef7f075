"""The ``cpu`` and ``cuda`` backends: a logits row is read once a pass, and the mix written only if it is the result."""

import torch
from torch import Tensor

from quietstar.ops._cuda import launch_place
from quietstar.ops._native import _C, DTYPE_CODES, address, as_rows


class Native:
    """The four functions of ``library.py`` by compiled kernels, those of ``_C.cpu`` or of ``_C.cuda``."""

    def __init__(self, backend: str):
        self.backend = backend

    def mix(self, base: Tensor, thought: Tensor, mixing_weight: Tensor) -> Tensor:
        """(1 − w) · base + w · thought, computed in float32, in the dtype of the logits."""
        rows = _Rows(self.backend, base, thought, mixing_weight)
        mixed = _contiguous_like(base)
        rows.kernels.mix(rows.dtype, *rows.inputs, address(mixed), *rows.sizes_and_place)
        return mixed

    def mix_backward(
        self, grad: Tensor, base: Tensor, thought: Tensor, mixing_weight: Tensor, needs: list[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of base, thought and, in float32, of the mixing weight; None where not needed."""
        rows = _Rows(self.backend, base, thought, mixing_weight)
        needs_base, needs_thought, needs_weight = needs
        d_base = _contiguous_like(base) if needs_base else None
        d_thought = _contiguous_like(thought) if needs_thought else None
        d_weight = base.new_empty(mixing_weight.shape, dtype=torch.float32) if needs_weight else None
        grad = as_rows(grad)
        rows.kernels.mix_backward(
            rows.dtype, address(grad), grad.stride(0), *rows.inputs, address(d_base), address(d_thought),
            address(d_weight), *rows.sizes_and_place,
        )  # fmt: skip
        return d_base, d_thought, d_weight

    def cross_entropy(
        self, base: Tensor, thought: Tensor, mixing_weight: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Nll, its slope by the mixing weight, largest mixed logit, log of the sum: as ``library.cross_entropy``."""
        rows = _Rows(self.backend, base, thought, mixing_weight)
        results = tuple(base.new_empty(target.shape, dtype=torch.float32) for _ in range(4))
        target = target.contiguous()
        rows.kernels.mixed_cross_entropy(
            rows.dtype, *rows.inputs, address(target), *map(address, results), *rows.sizes_and_place
        )
        return results

    def cross_entropy_backward(
        self,
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
        rows = _Rows(self.backend, base, thought, mixing_weight)
        needs_base, needs_thought = needs
        d_base = _contiguous_like(base) if needs_base else None
        d_thought = _contiguous_like(thought) if needs_thought else None
        scale, *others = [x.contiguous() for x in (scale, target, largest, log_total)]
        rows.kernels.mixed_cross_entropy_backward(
            rows.dtype, address(scale), *rows.inputs, *map(address, others), address(d_base), address(d_thought),
            *rows.sizes_and_place,
        )  # fmt: skip
        return d_base, d_thought


class _Rows:
    """Logits [..., V] and mixing weight [...] as the kernels of a backend take them."""

    def __init__(self, backend: str, base: Tensor, thought: Tensor, mixing_weight: Tensor):
        self.held = as_rows(base), as_rows(thought), mixing_weight.to(torch.float32).contiguous()  # until the call
        base, thought, mixing_weight = self.held
        self.kernels = getattr(_C, backend)
        self.dtype = DTYPE_CODES[base.dtype]
        self.inputs = (
            address(base), base.stride(0), address(thought), thought.stride(0), address(mixing_weight),
        )  # fmt: skip
        # By the backend, not by the device: tests run the kernels of ``cuda`` on a CPU.
        place = launch_place(base) if backend == "cuda" else (torch.get_num_threads(),)
        self.sizes_and_place = *base.shape, *place


def _contiguous_like(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)
