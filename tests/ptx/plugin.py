"""pytest --emulate sm_90: tests of Triton and CUDA kernels run them emulated; see docs/testing_kernels.md."""

import importlib
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

TRITON = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
CUDA = {"sm_90": "sm_90a", "sm_100": "sm_100a"}  # where nvcc's name is another
PROCESSORS = {80: 108, 90: 132, 100: 148}  # of an A100, an H100, a B200
OPS = ("linear_cross_entropy", "linear_sample", "mixing", "thought_attention")


def start(target: str) -> None:
    """Emulate the kernels of Triton and CUDA in this process."""
    import simt

    from quietstar.ops._availability import triton_unavailable

    from . import cuda_launches, triton_launches

    simt.emulate = cuda_launches.emulate(CUDA.get(target, target))

    architecture = TRITON[target]
    triton_launches.emulate(architecture)
    _let_triton_run_on_the_cpu(triton_unavailable)
    launch = importlib.import_module("quietstar.ops.thought_attention.triton_launch")
    launch.processors = lambda device: PROCESSORS[architecture]


def _let_triton_run_on_the_cpu(unavailable: Callable) -> None:
    import torch

    def emulated(tensor):
        return unavailable(tensor) if tensor.dtype == torch.float64 else None

    for op in OPS:
        backends = importlib.import_module(f"quietstar.ops.{op}.backends")
        backends.triton_unavailable = emulated
        if backends.BACKENDS["triton"].unavailable is unavailable:
            backends.BACKENDS["triton"] = backends.BACKENDS["triton"]._replace(unavailable=emulated)


class Plugin:
    """Fails tests in which a kernel did something wrong, and says what was launched."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.launches, self.seconds = Counter(), Counter()

    def pytest_report_header(self) -> str:
        return f"emulated: Triton and CUDA kernels on {self.target}, from their PTX"

    @pytest.fixture(autouse=True)
    def emulated_launches(self) -> Iterator[list]:
        """Those of the test, which fails if one touched memory it must not touch, raced, or the like."""
        from .launches import recorded, schedule

        schedule.order = 0
        with recorded() as launches:
            yield launches
        for launch in launches:
            self.launches[launch.name] += 1
            self.seconds[launch.name] += launch.seconds
        faults = [fault for launch in launches for fault in launch.faults()]
        if faults:
            pytest.fail("\n".join(dict.fromkeys(faults)), pytrace=False)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        for name, count in sorted(self.launches.items()):
            seconds = self.seconds[name]
            terminalreporter.write_line(f"emulated on {self.target}: {name}, {count} launches, {seconds:.1f} s")
