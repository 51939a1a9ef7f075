"""All that a CUDA machine can tell, in one command and without a network: ``make gpu-check``.

Each part runs in processes of its own, with a time limit, whatever became of the parts before it:

- build       ``pip install .`` with CUDA required
- tests       every backend and dtype on the device, against the specification
- sanitizer   memcheck and racecheck of the compiled kernels
- benchmarks  ours and every installed peer, op by op
- training    Mistral-7B's shape with random weights: tokens/s, model-FLOP utilisation, memory, against the baseline

Output: ``gpu-check.json`` (what ran, how it ended, how long it took, what it measured) and ``gpu-check.log``.
The exit code is 0 unless something failed; what cannot run here is said and is no failure.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from measure import machine

FORMAT = 1
ROOT = Path(__file__).parent.parent


class Step(NamedTuple):
    """One process of a part."""

    command: list[str]
    limit: int
    """Seconds after which it is killed; what it had written by then is kept."""
    result: Path | None = None
    """JSON that it writes."""


def build(folder: Path) -> list[Step]:
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    return [Step([*pip, "-C", "cmake.define.QUIETSTAR_CUDA=ON", str(ROOT)], limit=300)]


def tests(folder: Path) -> list[Step]:
    # The Triton tests run on the device where there is one and in the interpreter elsewhere, so they have no marker.
    pytest = [sys.executable, "-m", "pytest", "-q", "--durations=10", "-k", "gpu or triton", "tests"]
    return [Step(pytest, limit=240)]


def sanitizer(folder: Path) -> list[Step]:
    kernels = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/ops/test_native_cuda.py"]
    options = ["--error-exitcode", "1", "--target-processes", "all"]
    return [Step(["compute-sanitizer", "--tool", tool, *options, *kernels], 90) for tool in ("memcheck", "racecheck")]


def benchmarks(folder: Path) -> list[Step]:
    result = folder / "benchmarks.json"
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "--benchmark-only", f"--benchmark-json={result}"]
    return [Step(command, 240, result)]


def training(folder: Path) -> list[Step]:
    result = folder / "training.json"
    return [Step([sys.executable, "benchmarks/training_7b.py", "--json", str(result)], 150, result)]


PARTS: dict[str, Callable[[Path], list[Step]]] = {
    part.__name__: part for part in (build, tests, sanitizer, benchmarks, training)
}


def run(step: Step, log) -> dict:
    """Run one process, its output into ``log``; how it ended."""
    ended = {"command": step.command, "limit_s": step.limit}
    if shutil.which(step.command[0]) is None:
        return ended | {"not_run": f"{step.command[0]} is not on PATH"}
    print("$", *step.command, file=log, flush=True)
    start = time.perf_counter()
    try:
        exit_code = subprocess.run(
            step.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=step.limit
        ).returncode
    except subprocess.TimeoutExpired:
        exit_code = None
    ended |= {"seconds": round(time.perf_counter() - start, 1), "exit_code": exit_code}
    if step.result is not None and step.result.exists():
        ended["result"] = json.loads(step.result.read_text())
    return ended


def verdict(step: dict) -> str:
    if "not_run" in step:
        return f"not run: {step['not_run']}"
    if step["exit_code"] is None:
        return f"FAILED: killed after {step['limit_s']} s"
    return f"{'ok' if step['exit_code'] == 0 else 'FAILED'} in {step['seconds']:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="run these only")
    parser.add_argument("--output_dir", type=Path, default=Path("gpu-check"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check.py: no CUDA device here, nothing was run")
        return 0
    folder = options.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "format": FORMAT,
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", "benchmarks/gpu_check.py", "--parts", *options.parts],
        "parts": {},
    }
    failed = False
    with (folder / "gpu-check.log").open("w") as log:
        for part in options.parts:
            steps = []
            for step in PARTS[part](folder):
                steps.append(run(step, log))
                print(f"{part:<11} {verdict(steps[-1])}", flush=True)
                failed |= steps[-1].get("exit_code", 0) != 0
                report["parts"][part] = steps
                (folder / "gpu-check.json").write_text(json.dumps(report, indent=1))  # kept if this is cut short
    print(f"{folder / 'gpu-check.json'}, {folder / 'gpu-check.log'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
