"""Builds the kernels of the ``cuda`` backend for the CPU (``csrc/simt.h``) and puts them in place of the GPU's."""

import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ("mixing", "linear_cross_entropy", "linear_sample", "thought_attention")
NATIVE = tuple(f"quietstar.ops.{op}.native_cuda" for op in KERNELS)


def build(*definitions: str) -> ModuleType:
    """The module of ``csrc/module.cpp``, compiled with macros defined; skips the test where it cannot be built."""
    pybind11 = pytest.importorskip("pybind11", reason="the shim's module is built with pybind11")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler} is not on PATH")
    sources = [ROOT / "tests/csrc/module.cpp", ROOT / "csrc/cuda/bindings.cpp"]
    sources += [ROOT / f"csrc/cuda/{kernel}.cu" for kernel in KERNELS]
    includes = [ROOT / "csrc/include", ROOT / "tests/csrc", pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += [f"-I{path}" for path in includes] + [f"-D{definition}" for definition in definitions]

    texts = sorted([*(ROOT / "csrc").rglob("*.*"), *(ROOT / "tests/csrc").glob("*.*")])
    key = hashlib.sha256(repr([compiler, flags]).encode() + b"".join(path.read_bytes() for path in texts))
    folder = Path(tempfile.gettempdir()) / f"quietstar-simt-{os.getuid()}" / key.hexdigest()[:24]
    library = folder / "simt_module.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)

        def compiled(source: Path) -> Path:
            target = folder / f"{source.stem}.{os.getpid()}.o"
            subprocess.run([compiler, *flags, "-x", "c++", "-c", source, "-o", target], check=True)
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, sources))
        scratch = folder / f"simt_module.{os.getpid()}.so"
        subprocess.run([compiler, "-shared", *objects, "-o", scratch], check=True)
        scratch.replace(library)  # at once: another process may be waiting for it
    spec = importlib.util.spec_from_file_location("simt_module", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put_in_place(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ``cuda`` backend run on CPU tensors, by this module's kernels."""
    for name in NATIVE:
        native = importlib.import_module(name)
        monkeypatch.setattr(native, "_C", module)
        monkeypatch.setattr(native, "launch_place", lambda tensor: (0, 0))
