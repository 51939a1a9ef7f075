"""How fast a device is, and what follows for a training step: time, utilisation, the largest batch that fits."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from quietstar.estimate.flops import Part, model_flops, step_parts
from quietstar.estimate.memory import step_memory
from quietstar.estimate.step import TrainingStep


@dataclass(frozen=True)
class Device:
    """Peak rates and memory, and the shares of them that a step is assumed to reach.

    The shares of a GPU are assumptions, not measurements: long training runs with large matrices reach 0.5 to 0.7 of
    the dense peak, a plain copy 0.8 to 0.9 of the bandwidth; a CUDA context, error correction and gaps between blocks
    take some of the memory.
    """

    name: str
    half_flops: float
    """FLOP/s of dense bfloat16 or float16 products with float32 sums."""
    float32_flops: float
    """FLOP/s of float32 products, without TF32."""
    bandwidth: float
    """Bytes per second, read and written."""
    memory: int
    """Bytes."""
    kind: str = "cuda"
    flops_share: float = 0.6
    bandwidth_share: float = 0.8
    memory_share: float = 0.92

    def peak_flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of products of ``dtype``."""
        return self.half_flops if dtype.itemsize == 2 else self.float32_flops

    def seconds(self, part: Part, dtype: torch.dtype) -> float:
        """Time of a part: its products or its bytes, whichever takes longer."""
        products = part.flops / (self.peak_flops(dtype) * self.flops_share)
        return max(products, part.bytes / (self.bandwidth * self.bandwidth_share))


def _gpu(name: str, half_tflops: float, float32_tflops: float, terabytes_per_s: float, gibibytes: int) -> Device:
    return Device(name, half_tflops * 1e12, float32_tflops * 1e12, terabytes_per_s * 1e12, gibibytes * 2**30)


# From NVIDIA's public data sheets, without sparsity. What they call GB of memory is close to GiB.
GPUS = {
    "b200": _gpu("NVIDIA B200 (HGX)", 2250, 75, 7.7, 180),
    "h200": _gpu("NVIDIA H200 (SXM)", 989, 67, 4.8, 141),
    "h100": _gpu("NVIDIA H100 (SXM, 80 GB)", 989, 67, 3.35, 80),
    "a100": _gpu("NVIDIA A100 (SXM, 80 GB)", 312, 19.5, 2.039, 80),
    "l40s": _gpu("NVIDIA L40S", 362, 91.6, 0.864, 48),
    "rtx-4090": _gpu("NVIDIA GeForce RTX 4090", 165.2, 82.6, 1.008, 24),
}


def this_cpu(dtype: torch.dtype) -> Device:
    """This machine's CPU: the best of some large products of ``dtype`` and of some large copies. Takes seconds."""
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    flops = 2 * 1024**3 / _best_seconds(lambda: a @ b)
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _best_seconds(lambda: target.copy_(source))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = f"this CPU, {torch.get_num_threads()} threads, as measured"
    return Device(name, flops, flops, bandwidth, memory, "cpu", flops_share=1, bandwidth_share=1)


def _best_seconds(function: Callable[[], object], rounds: int = 10) -> float:
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begin)
    return best


@dataclass(frozen=True)
class Prediction:
    """Time of a step on a device."""

    step: TrainingStep
    device: Device

    @cached_property
    def parts(self) -> list[Part]:
        """Of the step."""
        return step_parts(self.step)

    @property
    def seconds(self) -> float:
        """Of a step: the sum over its parts, which run one after the other."""
        return sum(self.device.seconds(part, self.step.dtype) for part in self.parts)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of text per second."""
        return self.step.text_rows / self.seconds

    @property
    def utilisation(self) -> float:
        """Model-FLOP utilisation: FLOPs that the objective needs once, per second, in units of the peak."""
        return model_flops(self.step) / self.seconds / self.device.peak_flops(self.step.dtype)

    @property
    def usable_memory(self) -> int:
        """Bytes that tensors may take."""
        return int(self.device.memory * self.device.memory_share)

    def largest_batch(self) -> int:
        """Sequences of this length that fit at a time; 0 if not even one does."""

        def fits(batch: int) -> bool:
            return step_memory(replace(self.step, batch=batch)).peak <= self.usable_memory

        low, high = 0, 1
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low
