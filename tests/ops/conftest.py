"""Backends as fixtures."""

import pytest
import simt
from backends import ALL


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
