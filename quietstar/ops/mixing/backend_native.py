"""The ``cpu`` and ``cuda`` backends: each pass reads a logits row once, and only ``mix_logits`` writes the mix."""

import torch
from torch import Tensor

from quietstar.ops._native import _C, DTYPE_CODES, address, as_rows, launch_place
from quietstar.ops.mixing.backends import CrossEntropy, Mix


class Native:
    """The four functions of a backend, implemented by the compiled kernels of ``_C.cpu`` or ``_C.cuda``."""

    def __init__(self, backend: str):
        self.backend = backend

    def mix(self, mix: Mix) -> Tensor:
        """See ``backends.py``."""
        rows = _Rows(self.backend, mix)
        mixed = _contiguous_like(mix.base)
        rows.kernels.mix(rows.dtype, *rows.inputs, address(mixed), *rows.sizes_and_place)
        return mixed

    def mix_backward(self, grad: Tensor, mix: Mix, needs: list[bool]) -> tuple[Tensor | None, ...]:
        """See ``backends.py``."""
        rows = _Rows(self.backend, mix)
        d_base, d_thought = rows.logits_gradients(needs[:2])
        d_weight = mix.base.new_empty(mix.weight.shape, dtype=torch.float32) if needs[2] else None
        grad = as_rows(grad)
        rows.kernels.mix_backward(
            rows.dtype, address(grad), grad.stride(0), *rows.inputs, address(d_base), address(d_thought),
            address(d_weight), *rows.sizes_and_place,
        )  # fmt: skip
        return d_base, d_thought, d_weight

    def cross_entropy(self, mix: Mix, target: Tensor) -> CrossEntropy:
        """See ``backends.py``."""
        rows = _Rows(self.backend, mix)
        result = CrossEntropy(*(mix.base.new_empty(target.shape, dtype=torch.float32) for _ in CrossEntropy._fields))
        target = target.contiguous()
        rows.kernels.mixed_cross_entropy(
            rows.dtype, *rows.inputs, address(target), *map(address, result), *rows.sizes_and_place
        )
        return result

    def cross_entropy_backward(
        self, scale: Tensor, mix: Mix, target: Tensor, result: CrossEntropy, needs: list[bool]
    ) -> list[Tensor | None]:
        """See ``backends.py``."""
        rows = _Rows(self.backend, mix)
        gradients = rows.logits_gradients(needs)
        scale, *others = [x.contiguous() for x in (scale, target, result.largest, result.log_total)]
        rows.kernels.mixed_cross_entropy_backward(
            rows.dtype, address(scale), *rows.inputs, *map(address, others), *map(address, gradients),
            *rows.sizes_and_place,
        )  # fmt: skip
        return gradients


class _Rows:
    """Logits [..., V] and mixing weight [...] in the form that the kernels of a backend take."""

    def __init__(self, backend: str, mix: Mix):
        # References to keep until the kernel has been called: some may be copies.
        self.tensors = as_rows(mix.base), as_rows(mix.thought), mix.weight.to(torch.float32).contiguous()
        base, thought, weight = self.tensors
        self.like = mix.base
        self.kernels = getattr(_C, backend)
        self.dtype = DTYPE_CODES[base.dtype]
        self.inputs = address(base), base.stride(0), address(thought), thought.stride(0), address(weight)
        # Decided by the backend, not by the device: tests run the kernels of ``cuda`` on a CPU.
        place = launch_place(base) if backend == "cuda" else (torch.get_num_threads(),)
        self.sizes_and_place = *base.shape, *place

    def logits_gradients(self, needs: list[bool]) -> list[Tensor | None]:
        return [_contiguous_like(self.like) if needed else None for needed in needs]


def _contiguous_like(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)
