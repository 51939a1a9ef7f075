"""Triton's own launcher on a GPU that is not there.

``launched(script, gpu, *names)`` calls these of the functions in ``LAUNCHES``, of a Python file, in a process of its
own. There, tensors on
``pretended_gpu.DEVICE`` have no values, kernels are compiled as far as PTX, and Triton hands them to ``stub_driver``,
which refuses what CUDA's driver would refuse, and keeps the rest. Every launch is compared with what the kernel was
called with.
"""

import atexit
import functools
import json
import os
import runpy
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pretended_gpu import GPUS, pretended
from stub_driver import COMPILER, Launch, StubDriver

_TENSOR_MAP = object()
"""In place of the value of one, which only the driver knows."""


class Outcome(NamedTuple):
    """What came of a call."""

    launches: list[Launch]
    error: str | None
    """Type and text of the exception that it raised."""


@functools.cache
def launched(script: str, gpu: str, *names: str) -> dict[str, Outcome]:
    """What came of each call, by its name; ``gpu`` is a name of ``GPUS``.

    Skips the test where the stub and Triton's launcher cannot be built.
    """
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C compiler: {COMPILER} is not on PATH")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("Triton's launcher is built with Python.h, which is missing")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(["", *sys.path]), "TRITON_CACHE_DIR": str(_folder() / "triton")}
    environment["TRITON_LIBCUDA_PATH"] = str(_folder())
    done = subprocess.run(
        [sys.executable, __file__, script, gpu, str(_folder()), *names],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == 0, "see stderr"
    outcomes = json.loads(done.stdout.splitlines()[-1])
    return {name: Outcome([Launch(*launch) for launch in launches], error) for name, launches, error in outcomes}


@functools.cache
def _folder() -> Path:
    """Of the stub, and of what Triton keeps, which is not what it would keep for a GPU."""
    folder = tempfile.TemporaryDirectory(prefix="quietstar-launches-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _call(script: str, gpu: str, folder: str, *names: str) -> list:
    import triton
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.jit import JITFunction

    CUDABackend.make_cubin = lambda self, source, *others: source.encode()
    functions = runpy.run_path(script)["LAUNCHES"]
    outcomes = []
    with pretended(GPUS[gpu]) as memory:
        include = Path(triton.__file__).parent / "backends/nvidia/include"
        driver = StubDriver(GPUS[gpu], memory.is_on_gpu, Path(folder), include)
        active = CudaDriver()
        active.get_current_stream = lambda device: 0  # of which a PyTorch with CUDA would ask CUDA
        triton.runtime.driver.set_active(active)
        run = JITFunction.run

        def compared(self, *arguments, grid, warmup, **options):
            before = len(driver.launches)
            kernel = run(self, *arguments, grid=grid, warmup=warmup, **options)
            found = driver.launches[before:]
            assert len(found) == 1, f"{self.__name__} was launched {len(found)} times"
            expected = _expected(self, kernel, arguments, options)
            assert len(expected) == len(found[0].arguments), (found, expected)
            for (_, value), wanted in zip(found[0].arguments, expected, strict=True):
                assert wanted in (value, _TENSOR_MAP), (found, expected)
            return kernel

        JITFunction.run = compared
        for name in names:
            driver.launches.clear()
            error = None
            try:
                functions[name]()
            except Exception as raised:
                traceback.print_exc()
                error = f"{type(raised).__name__}: {raised}"
            outcomes.append((name, list(driver.launches), error))
    return outcomes


def _expected(function, kernel, arguments, options) -> list:
    """The values that a kernel is to get, from what it was called with."""
    names = [parameter.name for parameter in function.params]
    bound = function.signature.bind(*arguments, **{name: x for name, x in options.items() if name in names})
    bound.apply_defaults()
    signature = kernel.src.signature
    values = [leaf for name in names for leaf in _leaves(bound.arguments[name], signature[name])]
    return [*values, 0, 0]  # and Triton's scratch memory, of which we use none


def _leaves(value, kind) -> list:
    if isinstance(kind, tuple):
        return [leaf for pair in zip(value or (), kind, strict=True) for leaf in _leaves(*pair)]
    if kind == "constexpr":
        return []
    if kind.startswith("tensordesc"):
        return [_TENSOR_MAP, *value.shape, *value.strides]
    if isinstance(value, torch.Tensor):
        return [value.data_ptr()]
    if kind == "fp32":
        return [struct.unpack("<f", struct.pack("<f", value))[0]]
    return [value % 2 ** int(kind[1:])]  # PTX has no signs


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    print(json.dumps(_call(*sys.argv[1:])))
