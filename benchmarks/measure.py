"""Time, memory and the machine's own speed: what every benchmark measures with."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THREADS = 2  # of the promises made for the CPU; set on import so that child processes have them too
if DEVICE == "cpu":
    torch.set_num_threads(THREADS)

_MORE_THAN_L2 = 512 * 2**20  # bytes


def settle() -> None:
    """Idle device, nothing useful in its L2 cache."""
    if DEVICE == "cuda":
        torch.empty(_MORE_THAN_L2, dtype=torch.int8, device=DEVICE).zero_()
        torch.cuda.synchronize()


def to_the_end(function: Callable[[], object]) -> Callable[[], None]:
    """``function``, returning only when the device has done its work."""

    def run() -> None:
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, from an idle device to its end."""
    run = to_the_end(function)
    settle()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@cache
def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of this machine's large square matrix product, the best of ten: what "peak" means in the tables."""
    n = 8192 if DEVICE == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(10))


def own_peak_memory() -> int:
    """Peak memory of this process in bytes: allocated on the GPU if there is one, else resident."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux a child starts out with its parent's.
        kibibytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kibibytes) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def peak_memory(script: str, *arguments: str) -> int:
    """``own_peak_memory()`` of ``script arguments`` in a process of its own; the script prints it on its last line."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, script, *arguments]
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(printed.splitlines()[-1])
