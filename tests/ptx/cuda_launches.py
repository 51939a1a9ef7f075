"""CUDA kernels on CPU tensors: launched by the project's own host code, executed from the PTX that nvcc makes of them.

``emulate(target)`` makes what ``simt.emulate`` is to be.
"""

import atexit
import functools
import importlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import simt
import torch

from .kernel import Kernel, Module
from .launches import launch, reached, schedule
from .library import kept

CSRC = simt.ROOT / "csrc"

# Changes a module's PTX before it is run; for tests of the emulator itself.
state = SimpleNamespace(edit=None)


@functools.cache
def _compiled(op: str, target: str) -> str:
    """The PTX that nvcc makes of an op's kernels, kept between runs."""
    command = ["nvcc", "-ptx", "-lineinfo", "-std=c++17", f"-arch={target}", f"-I{CSRC / 'include'}"]
    version = subprocess.run(["nvcc", "--version"], check=True, stdout=subprocess.PIPE).stdout
    source = CSRC / f"cuda/{op}.cu"
    texts = [source.read_bytes(), *(path.read_bytes() for path in sorted((CSRC / "include").rglob("*.*")))]
    folder = kept("cuda-ptx", repr(command), version, *texts)
    path = folder / f"{op}.ptx"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            written = Path(scratch) / path.name
            subprocess.run([*command, "-o", written, source], check=True)
            written.replace(path)  # at once: other processes may be doing the same
    return path.read_text()


@functools.cache
def _kernel(name: str, target: str, edit: Callable[[str], str] | None) -> Kernel:
    text = _compiled(_op_of(_readable(name)), target)
    return Kernel(Module(edit(text) if edit else text), name)


@functools.cache
def _op_of(kernel: str) -> str:
    """The op in whose files the kernel is defined."""
    for op in simt.OPS:
        if any(f" {kernel}(" in path.read_text() for path in CSRC.glob(f"include/quietstar/{op}*.cuh")):
            return op
    raise KeyError(f"no file of an op defines {kernel}")


def _readable(name: str) -> str:
    """``mix_kernel`` of the name in PTX."""
    return re.search(r"\d([a-z_]+_kernel)", name)[1]


class _Functions:
    """The functions of a compiled module; what was handed to one as an address is memory of its kernels."""

    def __init__(self, module: ModuleType, tensors: list[torch.Tensor]) -> None:
        self._module, self._tensors = module, tensors

    def __getattr__(self, name: str):
        found = getattr(self._module, name)
        if name == "cuda":
            return _Functions(found, self._tensors)
        if not callable(found):
            return found

        def call(*arguments, **named):
            try:
                return found(*arguments, **named)
            finally:
                self._tensors.clear()

        return call


def emulate(target: str) -> Callable[[pytest.MonkeyPatch, ModuleType], object]:
    """What hands the kernels of the module of ``tests/csrc`` to the emulator, for ``target``: sm_80, sm_90a."""

    def emulated(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> object:
        if shutil.which("nvcc") is None:
            pytest.skip("nvcc is not on PATH")
        tensors: list[torch.Tensor] = []

        def run(name, blocks, threads, dynamic_shared, parameter):
            kernel = _kernel(name, target, state.edit)
            parameter = parameter[: kernel.parameter_bytes].ljust(kernel.parameter_bytes, b"\0")
            launch(
                _readable(name), kernel, (blocks, 1, 1), threads, dynamic_shared, parameter, reached(tensors)
            )  # fmt: skip

        module.set_launcher(run)
        atexit.register(module.set_launcher, None)
        for op, name in simt.OPS.items():
            native = importlib.import_module(f"quietstar.ops.{op}.{name}")

            def noted(tensor, *rest, address=native.address):
                if tensor is not None:
                    tensors.append(tensor)
                return address(tensor, *rest)

            monkeypatch.setattr(native, "address", noted)
        functions = _Functions(module, tensors)
        functions.set_random_seed = lambda seed: setattr(schedule, "order", 2 + seed)
        return functions

    return emulated
