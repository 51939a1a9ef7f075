"""Backends as fixtures."""

import contextlib
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import simt
import torch
from backends import ALL
from waiting import launch_nothing

from quietstar.ops import _native

if TYPE_CHECKING:  # it imports Triton, which must wait until it is known how kernels run
    from pretended_gpu import Gpu


@pytest.fixture(params=[*ALL, "triton", "cuda"])
def every_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend in turn; the last two on ``device``, or in its place."""
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param == "cuda":
        simt.use_cuda_kernels(monkeypatch)
    return request.param


@pytest.fixture
def device(every_backend: str) -> str:
    """Where the backend runs."""
    return simt.DEVICE if every_backend in ("triton", "cuda") else "cpu"


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> "Iterator[Gpu]":
    """A GPU that is not there, an H100 if no other is named as a parameter. No kernel is launched."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    import pretended_gpu

    name = getattr(request, "param", "H100")
    for op in simt.OPS:  # Triton decides when it sees a kernel whether to interpret it, and other tests want that
        with contextlib.suppress(ImportError):
            importlib.import_module(f"quietstar.ops.{op}.backends").BACKENDS["triton"].load()
    with contextlib.suppress(ImportError):  # which the backend loads when it takes it; or Triton is too old
        importlib.import_module("quietstar.ops.thought_attention.gluon_forward")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    try:
        from quietstar.ops import _launch_table as table
    except ImportError:
        pass
    else:
        launch_nothing(monkeypatch)
        family = {"A100": table.AMPERE, "H100": table.HOPPER, "B200": table.BLACKWELL}
        monkeypatch.setattr(table, "architecture", lambda: family.get(name, table.COMPACT))
    monkeypatch.setattr(_native, "_ARCHITECTURES", ("80-virtual",) if _native._ARCHITECTURES else ())
    with pretended_gpu.pretended(pretended_gpu.GPUS[name]):
        yield pretended_gpu.GPUS[name]


@pytest.fixture(params=["reference", "torch", "triton", "cuda"])
def gpu_backend(request: pytest.FixtureRequest, gpu: "Gpu", monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend on a GPU that is not there."""
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param == "cuda":
        if not _native._ARCHITECTURES:
            pytest.skip("needs the compiled module, built with CUDA")
        kernels = SimpleNamespace(cuda=_UpToTheLaunch(), cpu=_native._C.cpu)
        for module in simt.native_modules():
            monkeypatch.setattr(module, "_C", kernels)
    return request.param


class _UpToTheLaunch:
    """The functions of ``_C.cuda``: they check what they are given, and find no GPU to launch a kernel on."""

    def __getattr__(self, name: str) -> object:
        found = getattr(_native._C.cuda, name)
        if not callable(found):
            return found

        def call(*args: object) -> None:
            with pytest.raises(RuntimeError, match=r"^cudaGetDevice: "):
                found(*args)

        return call
