"""Time, memory and the machine's own speed: what every benchmark measures with."""

import ctypes
import platform
import resource
import runpy
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import cache
from importlib import metadata
from io import StringIO
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THREADS = 2  # of the promises made for the CPU; set on import so that child processes have them too
if DEVICE == "cpu":
    torch.set_num_threads(THREADS)

PACKAGES = ("triton", "transformers")
_MORE_THAN_L2 = 512 * 2**20  # bytes
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def seconds(function: Callable[[], object]) -> float:
    """Time of one call, from an idle device until it has done its work.

    On a GPU nothing useful is in its L2 cache, and the time is the device's own, between two events: while it clears
    the cache the host has time to submit the call, so what is timed is not the launching.
    """
    if DEVICE == "cpu":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.empty(_MORE_THAN_L2, dtype=torch.int8, device=DEVICE).zero_()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def keep_freed_memory() -> None:
    """From now on what this process frees on a CPU stays with it and is soon used again, as it is on a GPU.

    Otherwise glibc returns large blocks to the system and gets new ones from it, page by page, which says more about
    the machine than about an op: a virtual one may take 0.1 s for a gigabyte, or 2 s. Other C libraries do as they do.
    """
    libc = ctypes.CDLL(None)
    if DEVICE == "cpu" and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


@cache
def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of this machine's large square matrix product, the best of ten: what "peak" means in the tables."""
    n = 8192 if DEVICE == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(10))


@cache
def copy_peak() -> float:
    """Bytes per second of a large copy on this machine, read and written, the best of ten."""
    source = torch.ones((2**30 if DEVICE == "cuda" else 2**28) // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(10))


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


def peak_memory(script: str, *arguments: str, run: Callable[[], object] | None = None) -> int:
    """``own_peak_memory()`` of ``script arguments`` in a process of its own; the script prints it on its last line.

    Measured once for the same arguments. If ``run`` is given, it does the same work in this process, and on a GPU no
    other is started: the peak is then what ``run`` allocates, without what was there before, such as its inputs.
    """
    if run is not None and DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return own_peak_memory() - before
    return _peak_of_process(script, *arguments)


@cache
def _peak_of_process(script: str, *arguments: str) -> int:
    with ProcessPoolExecutor(max_workers=1, mp_context=_fresh_processes()) as process:
        return process.submit(_last_number_printed, script, arguments).result()


@cache
def _fresh_processes() -> BaseContext:
    """How to start processes that have done nothing yet. On a CPU they have torch from a parent that does only that."""
    if DEVICE == "cuda":  # what a driver has begun does not survive a fork
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


def _last_number_printed(script: str, arguments: tuple[str, ...]) -> int:
    sys.argv = [script, *arguments]
    with redirect_stdout(StringIO()) as printed:
        runpy.run_path(script, run_name="__main__")
    return int(printed.getvalue().splitlines()[-1])


def tensor_memory(function: Callable[[], object]) -> int:
    """Most bytes of tensors at a time while ``function`` runs, beyond those there were before."""
    if DEVICE == "cuda":
        return peak_memory("", run=function)
    from memory import peak_bytes  # of the tests, which are not on the path of a script

    return peak_bytes(function)


def machine() -> dict[str, str | int | None]:
    """What the numbers depend on: device, threads and versions; None where there is no such thing."""
    import quietstar  # here, so that whoever only takes the time needs no more than torch

    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else _processor(),
        "kind": DEVICE,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "quietstar": quietstar.__version__,
        "torch": torch.__version__,
        **{package: _version(package) for package in PACKAGES},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
