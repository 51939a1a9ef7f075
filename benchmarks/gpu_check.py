"""All that a CUDA machine can tell, in one command and without a network: ``make gpu-check``.

Each part runs in processes of its own, whatever became of the parts before it:

- build       ``pip install`` of this checkout with CUDA required, for this GPU, into a folder of the output
- tests       every backend and dtype on the device, against the specification
- sanitizer   memcheck and racecheck of the compiled kernels
- benchmarks  the key ones: ours and every installed peer, the most telling first
- tuning      ``python -m quietstar.ops.tune``: rows for the launch tables, into ``benchmarks/results/tuned-DEVICE.txt``
- training    Mistral-7B's shape with random weights: tokens/s, model-FLOP utilisation, memory, against the baseline

At the end stands, a line each, whether what is promised of speed holds, against every peer too (``promises``).

Every part has its share of the time, and of what the parts before it have left. Shortly before a share ends its
processes begin nothing new, and say what they leave out; at its end they are interrupted and what they have is kept.
Without the build, what is tested is the checkout.

Output: ``gpu-check.json`` (what ran, how it ended, how long it took, what it measured, what became of promises) and
``gpu-check.log``. The exit code is 0 unless something failed; what cannot run here, or finds no time, is said and is no
failure, nor is a promise that does not hold.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from measure import machine
from promises import lines
from report import ReportError, checked
from time_limit import OUT_OF_TIME

FORMAT = 3
ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # where quietstar is not installed
SITE = "site"  # of the output folder: what is built
FINISHING = 25  # seconds that a test or a batch in progress may take when a share ends, at most a third of it
DYING = 5  # seconds after the interrupt
PYTEST = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "time_limit"]  # -P: not the checkout, if there is a build
KERNEL_TESTS = ["tests/ops/test_native_cuda.py", "tests/ops/test_native_cuda_attention.py"]
KEY_BENCHMARKS = [
    "bench_thought_attention.py::bench_thought_attention[triton-forward, L = 2048]",
    "bench_thought_attention.py::bench_thought_attention[triton-backward, L = 2048]",
    "bench_linear_cross_entropy.py::bench_cross_entropy[triton-mixed_linear-2048]",
    "bench_thought_attention.py::bench_thought_attention[triton-forward, L = 4096]",
    "bench_thought_attention.py::bench_thought_attention[triton-backward, L = 4096]",
    "bench_linear_sample.py::bench_linear_sample[triton-16384]",
    "bench_mixing.py::bench_mixing[triton-mixed_cross_entropy-16384]",
    "bench_thought_attention.py::bench_thought_attention[triton-sampling step]",
    "bench_thought_attention.py::bench_thought_attention[cuda-sampling step]",
    "bench_linear_cross_entropy.py::bench_cross_entropy[triton-linear-16384]",
    "bench_linear_cross_entropy.py::bench_cross_entropy[triton-mixed_linear-16384]",
    "bench_thought_attention.py::bench_thought_attention[triton-decoding]",
    "bench_thought_attention.py::bench_thought_attention[cuda-decoding]",
    "bench_thought_attention.py::bench_thought_attention[triton-forward+backward]",
    "bench_mixing.py::bench_mixing[cuda-mixed_cross_entropy-16384]",
    "bench_linear_sample.py::bench_linear_sample[cuda-16384]",
]


class Step(NamedTuple):
    """One process of a part."""

    command: list[str]
    result: Path | None = None
    """JSON that it writes."""


def build(folder: Path, seconds: float) -> list[Step]:
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}{'a' if major >= 9 else ''}-real"
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--upgrade"]
    options = ["QUIETSTAR_CUDA=ON", f"CMAKE_CUDA_ARCHITECTURES={architecture}"]
    defines = [word for option in options for word in ("-C", f"cmake.define.{option}")]
    return [Step([*pip, "--target", str(folder / SITE), *defines, str(ROOT)])]


def tests(folder: Path, seconds: float) -> list[Step]:
    # Those of the kernels run on the device where there is one and elsewhere without, so they have no marker.
    kernels = [*KERNEL_TESTS, *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/ops/*_triton.py"))]
    return [
        Step([*PYTEST, f"--seconds={seconds}", *each]) for each in (["-m", "gpu", "tests"], *([k] for k in kernels))
    ]


def sanitizer(folder: Path, seconds: float) -> list[Step]:
    options = ["--error-exitcode", "1", "--target-processes", "all"]
    return [
        Step(["compute-sanitizer", "--tool", tool, *options, *PYTEST, f"--seconds={seconds}", kernels])
        for tool in ("memcheck", "racecheck")
        for kernels in KERNEL_TESTS
    ]


def benchmarks(folder: Path, seconds: float) -> list[Step]:
    result = folder / "benchmarks.json"
    options = ["--benchmark-only", f"--benchmark-json={result}", f"--seconds={seconds}"]
    return [Step([*PYTEST, *options, *(f"benchmarks/{name}" for name in KEY_BENCHMARKS)], result)]


def tuning(folder: Path, seconds: float) -> list[Step]:
    device = re.sub(r"\W+", "-", str(machine()["device"])).strip("-").lower()
    rows = ROOT / "benchmarks" / "results" / f"tuned-{device}.txt"
    command = [sys.executable, "-P", "-m", "quietstar.ops.tune"]
    return [Step([*command, "--minutes", f"{seconds / 60:.2f}", "--output", str(rows)])]


def training(folder: Path, seconds: float) -> list[Step]:
    result = folder / "training.json"
    options = ["--json", str(result), "--seconds", str(seconds)]
    return [Step([sys.executable, "benchmarks/training_7b.py", *options], result)]


class Part(NamedTuple):
    share: int
    """Of the time; parts that do not run leave theirs to the others."""
    steps: Callable[[Path, float], list[Step]]
    """Given the output folder and the seconds after which to begin nothing new. They run at the same time."""


PARTS = {
    "build": Part(100, build),
    "tests": Part(80, tests),
    "sanitizer": Part(40, sanitizer),
    "benchmarks": Part(135, benchmarks),
    "tuning": Part(105, tuning),
    "training": Part(110, training),
}


def run(steps: Sequence[Step], folder: Path, seconds: float, log) -> list[dict]:
    """Run processes at the same time, one's output after the other's into ``log``; how they ended."""
    paths = [str(folder / SITE), str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    start, running, ended = time.monotonic(), {}, {}
    for number, step in enumerate(steps):
        ended[number] = {"command": step.command}
        if shutil.which(step.command[0]) is None:
            ended[number]["not_run"] = f"{step.command[0]} is not on PATH"
            continue
        if step.result is not None:
            step.result.unlink(missing_ok=True)  # of an earlier run
        with (folder / f"{number}.log").open("w") as output:
            running[number] = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True,
                preexec_fn=heed_interrupts,
            )  # fmt: skip
    try:
        while running and time.monotonic() < start + seconds:
            for number in [number for number, process in running.items() if process.poll() is not None]:
                ended[number] |= {"seconds": time.monotonic() - start, "exit_code": running.pop(number).returncode}
            time.sleep(0.1)
    finally:
        stop(running.values())
    for number in running:
        ended[number] |= {"seconds": time.monotonic() - start, "exit_code": None}
    for number, step in enumerate(steps):
        output = folder / f"{number}.log"
        if output.exists():
            log.write(f"$ {' '.join(step.command)}\n{output.read_text(errors='replace')}\n{verdict(ended[number])}\n\n")
            output.unlink()
        if step.result is not None and step.result.exists():
            ended[number]["result"] = read(step.result)
    log.flush()
    return list(ended.values())


def heed_interrupts() -> None:
    """What a shell starts in the background ignores interrupts, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(processes: Collection[subprocess.Popen]) -> None:
    """Interrupt what still runs, so that it writes what it has, then kill it, with all that it has started."""
    for how in (signal.SIGINT, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # all gone
                os.killpg(process.pid, how)
        end = time.monotonic() + DYING
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            time.sleep(0.1)


def read(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        return f"{path} is not JSON: {error}"


def promises(step: dict) -> list[str]:
    """What became of them, from the benchmarks' step; one line that says why, where there are no results."""
    if "result" not in step:
        return ["promises: nothing was measured"]
    try:
        results = checked(step["result"], Path("benchmarks.json"))
    except ReportError as error:
        return [f"promises: {error}"]
    return list(lines(results, (name.partition("::bench_")[2] for name in KEY_BENCHMARKS)))


def verdict(step: dict) -> str:
    if "not_run" in step:
        return f"not run: {step['not_run']}"
    if step["exit_code"] is None:
        return f"FAILED: interrupted after {step['seconds']:.0f} s"
    if step["exit_code"] == OUT_OF_TIME:
        return f"ok as far as it came in {step['seconds']:.0f} s, the log says what was not begun"
    return f"{'ok' if step['exit_code'] == 0 else 'FAILED'} in {step['seconds']:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="run these only")
    parser.add_argument("--output_dir", type=Path, default=Path("gpu-check"), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    if not torch.cuda.is_available():
        print("gpu_check.py: no CUDA device here, nothing was run")
        return 0
    end = time.monotonic() + 60 * options.minutes
    folder = options.output_dir.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / "gpu-check.log").open("w")
    except OSError as error:
        parser.error(f"--output_dir {options.output_dir}: {error.strerror}")
    report = {
        "format": FORMAT,
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", "benchmarks/gpu_check.py", *(sys.argv[1:] if arguments is None else arguments)],
        "parts": {},
    }
    failed = False
    with log:
        for i, name in enumerate(options.parts):
            share = PARTS[name].share / sum(PARTS[other].share for other in options.parts[i:])
            seconds = share * (end - time.monotonic()) - DYING
            begin = round(seconds - min(FINISHING, seconds / 3), 1)
            report["parts"][name] = run(PARTS[name].steps(folder, begin), folder, seconds, log)
            for step in report["parts"][name]:
                of = f" ({step['command'][-1]})" if len(report["parts"][name]) > 1 else ""
                print(f"{name:<11} {verdict(step)}{of}", flush=True)
                failed |= step.get("exit_code", 0) not in (0, OUT_OF_TIME)
            if name == "benchmarks":
                report["promises"] = promises(report["parts"][name][0])
            (folder / "gpu-check.json").write_text(json.dumps(report, indent=1))  # kept if this is cut short
    print(*report.get("promises", ()), f"{folder / 'gpu-check.json'}, {folder / 'gpu-check.log'}", sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
