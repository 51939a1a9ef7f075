"""What holds for every test: a fixed seed, and where there is no GPU, no GPU test and Triton's interpreter."""

import os
from collections.abc import Iterator

import pytest
import torch
from backends import FAST
from versions import version_of

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported; "auto" still passes Triton over


def pytest_addoption(parser: pytest.Parser) -> None:
    targets = "sm_80", "sm_90", "sm_100"
    parser.addoption("--emulate", choices=targets, help="emulate the kernels of this GPU: docs/testing_kernels.md")


def pytest_configure(config: pytest.Config) -> None:
    """Kernels that are emulated are not interpreted."""
    target = config.getoption("--emulate")
    if target is not None:
        from ptx import plugin

        os.environ.pop("TRITON_INTERPRET", None)
        plugin.start(target)
        config.pluginmanager.register(plugin.Plugin(target))
    elif "TRITON_INTERPRET" in os.environ and (0,) < version_of("triton") < (3, 8) and version_of("numpy") >= (2, 4):
        raise pytest.UsageError("Triton's interpreter before 3.8 needs NumPy < 2.4: pip install 'numpy<2.4'")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared with other workers
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    skips = {
        "gpu": (not torch.cuda.is_available(), "needs a CUDA device"),
        "interpreted": (os.environ.get("TRITON_INTERPRET") != "1", "kernels are not interpreted"),
    }
    for item in items:
        for marker, (skipped, reason) in skips.items():
            if skipped and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=FAST)
def default_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of calls that name none: each of the fast ones on a CPU in turn."""
    monkeypatch.setenv("QUIETSTAR_BACKEND", request.param)
    return request.param
