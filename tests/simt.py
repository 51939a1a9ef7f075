"""The kernels of the ``cuda`` backend for tests: the GPU's where there is one, else compiled for the CPU.

On the CPU they run under ``csrc/simt.h``, in a module that takes the place of the compiled one, so that everything from
the public functions down to the kernels is as on a GPU, but for the device.
"""

import functools
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quietstar.ops._backend import always_available
from quietstar.ops._native import cuda_unavailable
from quietstar.ops.thought_attention import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[1]
OPS = {  # and the module of each that calls the kernels
    "linear_cross_entropy": "backend_cuda",
    "linear_sample": "backend_cuda",
    "mixing": "backend_native",
    "thought_attention": "backend_cuda",
}


# Set by `pytest --emulate`: hands the kernels of the module over to the emulator of PTX.
emulate: Callable[[pytest.MonkeyPatch, ModuleType], ModuleType] | None = None


def use_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType | None:
    """Let ``backend="cuda"`` run on tensors of DEVICE. Returns the module of ``csrc/module.cpp`` if it has to."""
    if DEVICE == "cuda":
        reason = cuda_unavailable(torch.empty(0, device=DEVICE))
        if reason is not None:
            pytest.skip(reason)
        return None
    module = build()
    module.set_random_seed(0)
    module.set_fault("")
    if emulate is not None:
        module = emulate(monkeypatch, module)
    for op, native in zip(OPS, native_modules(), strict=True):
        monkeypatch.setattr(native, "_C", module)
        monkeypatch.setattr(native, "launch_place", lambda tensor: (0, 0))
        if op == "thought_attention":
            monkeypatch.setattr(backends, "cuda_unavailable", always_available)
            continue
        table = importlib.import_module(f"quietstar.ops.{op}.backends").BACKENDS
        monkeypatch.setitem(table, "cuda", table["cuda"]._replace(unavailable=always_available))
    attention = importlib.import_module("quietstar.ops.thought_attention.backend_cuda")
    monkeypatch.setattr(attention, "processors", lambda device: 4)
    return module


def native_modules() -> list[ModuleType]:
    """The modules that call the kernels, one for every op."""
    return [importlib.import_module(f"quietstar.ops.{op}.{name}") for op, name in OPS.items()]


@functools.cache
def build() -> ModuleType:
    """The module of ``csrc/module.cpp``, kept between runs; skips the test where it cannot be built."""
    pybind11 = pytest.importorskip("pybind11", reason="the module is built with pybind11")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler} is not on PATH")
    sources = [ROOT / "tests/csrc/module.cpp", ROOT / "csrc/cuda/bindings.cpp"]
    sources += [ROOT / f"csrc/cuda/{op}.cu" for op in OPS]
    includes = [ROOT / "csrc/include", ROOT / "tests/csrc", pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += [f"-I{path}" for path in includes]  # nothing is hidden: dladdr names kernels

    texts = sorted([*(ROOT / "csrc").rglob("*.*"), *(ROOT / "tests/csrc").glob("*.*")])
    key = hashlib.sha256(repr([compiler, flags]).encode() + b"".join(path.read_bytes() for path in texts))
    folder = Path(tempfile.gettempdir()) / f"quietstar-simt-{os.getuid()}" / key.hexdigest()[:24]
    library = folder / "simt_module.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder))

        def compiled(source: Path) -> Path:
            target = scratch / f"{source.stem}.o"
            subprocess.run([compiler, *flags, "-x", "c++", "-c", source, "-o", target], check=True)
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, sources))
        subprocess.run([compiler, "-shared", *objects, "-ldl", "-o", scratch / library.name], check=True)
        (scratch / library.name).replace(library)  # at once: another process may be about to load it
        shutil.rmtree(scratch)
    spec = importlib.util.spec_from_file_location("simt_module", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
