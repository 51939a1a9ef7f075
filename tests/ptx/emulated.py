"""Tests of Triton and CUDA kernels, run emulated: in a pytest of their own, since this one has Triton's interpreter.

The tests are those of ``tests/ops``, with all their cases; only what runs the kernels is another.
"""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from . import library

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_90")
every_target = pytest.mark.parametrize("target", TARGETS)
# Of what happens where kernels cannot run: here they can.
NOT_EMULATED = "not test_cpu_tensors_need_the_interpreter"


def run_emulated(target: str, file: str, select: str = "", *, workers: int = 0) -> None:
    """Run the tests of ``tests/ops/FILE`` that ``-k select`` names with all kernels emulated on ``target``.

    Each must pass, and none be skipped. Without a C++ compiler or, for CUDA's kernels, nvcc the test is skipped.

    Args:
        workers: processes to run them in; 0 is this one's child alone.
    """
    needed = [os.environ.get("CXX", "g++")] + ["nvcc"] * ("cuda" in file)
    for program in needed:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on PATH")
    report = library.kept("reports", str(os.getpid())) / "emulated.xml"
    select = f"{NOT_EMULATED} and ({select})" if select else NOT_EMULATED
    command = [
        sys.executable, "-P", "-m", "pytest", f"--emulate={target}", f"tests/ops/{file}", "-k", select, "-q",
        "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}",
    ]  # fmt: skip
    if workers:
        command += ["-n", str(workers)]
    hidden = ("TRITON_INTERPRET", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, f"emulated on {target}: {file} failed, see above"
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert int(suite.get("tests")) > 0
    assert int(suite.get("skipped")) == 0
