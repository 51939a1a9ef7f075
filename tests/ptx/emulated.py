"""Tests of Triton and CUDA kernels, run emulated: in a pytest of their own, since this one has Triton's interpreter.

The tests are those of ``tests/ops``, with all their cases; only what runs the kernels is another.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from versions import version_of

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100")
every_target = pytest.mark.parametrize("target", TARGETS)
CXX = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"{CXX} is not on PATH")


_TRITON = version_of("triton")
needs_gluon = pytest.mark.skipif(_TRITON < (3, 8), reason=f"the kernels in Gluon need Triton 3.8, not {_TRITON}")


def run_emulated(target: str, tests: dict[str, str], *, workers: int = 0) -> set[str]:
    """Run tests with all kernels emulated on ``target``; returns the names of those that were launched.

    Each must pass, and none be skipped. Without a C++ compiler or, for CUDA's kernels, nvcc the test is skipped.

    Args:
        tests: by file under ``tests``, which of its tests: an expression of ``pytest -k``, or an empty text for all.
        workers: processes to run them in; 0 is this one's child alone. Others tell no names of kernels.
    """
    needed = [CXX] + ["nvcc"] * any("cuda" in file for file in tests)
    for program in needed:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on PATH")
    names = {file: Path(file).name for file in tests}
    chosen = " or ".join(f"({names[file]} and ({select}))" if select else names[file] for file, select in tests.items())
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable, "-P", "-m", "pytest", f"--emulate={target}", *(f"tests/{file}" for file in tests),
            "-k", chosen, "-m", "not slow and not interpreted", "-q", "--tb=short", "-p", "no:cacheprovider",
            f"--junitxml={report}",
        ]  # fmt: skip
        if workers:
            command += ["-n", str(workers)]
        hidden = ("TRITON_INTERPRET", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment["OMP_NUM_THREADS"] = "1"
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )  # fmt: skip
        print(done.stdout)
        assert done.returncode == 0, f"emulated on {target}: see above"
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert int(suite.get("skipped")) == 0, f"emulated on {target}: some were skipped, see above"
    ran = {case.get("classname").split(".")[-1] + ".py" for case in suite.iter("testcase")}
    assert ran == set(names.values()), f"emulated on {target}: of {list(tests)} only {ran} had tests to run"
    return set(re.findall(rf"^emulated on {target}: (\w+), \d+ launches", done.stdout, re.M))


def kernels_of(op: str) -> set[str]:
    """The Triton kernels of an op, by their names. Those in Gluon have test files of their own, ``test_gluon_*.py``."""
    texts = [path.read_text() for path in (ROOT / "quietstar/ops" / op).glob("triton*.py")]
    return {name for text in texts for name in re.findall(r"^def ([a-z]\w*_kernel)\(", text, re.M)}
