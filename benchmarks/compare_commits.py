"""The ops of this checkout against those of another commit: before a change of kernels is sent.

    python benchmarks/compare_commits.py BASE                                   all ops, against a commit, branch or tag
    python benchmarks/compare_commits.py BASE --ops linear_sample --rounds 30

Builds both (``pip install`` into folders of their own; uncommitted changes count), runs the tests of each op with each
of the two, then times both in turns, each in a process of its own, on the shapes of ``shapes.py``. A ratio is the time
of BASE over that of the checkout: above 1 the checkout is faster. Its spread is the interquartile range of the ratios
of neighbouring calls; where 1 lies within, there is no difference. The exit code is 1 if a test failed.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TESTS = {
    "thought_attention": ["test_thought_attention.py", "test_thought_attention_unseen.py"],
    "linear_cross_entropy": ["test_linear_cross_entropy.py"],
    "linear_sample": ["test_linear_sample.py"],
    "mixing": ["test_mixing.py"],
}  # of tests/ops
INSTALL = ["pip", "install", "--quiet", "--no-deps", "--target"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", metavar="BASE", help="a commit, branch or tag")
    parser.add_argument("--ops", nargs="+", choices=TESTS, default=list(TESTS), metavar="OP", help=", ".join(TESTS))
    parser.add_argument("--rounds", type=_count, default=15, help="calls of each that are timed (default: %(default)s)")
    parser.add_argument("--backend", help="of the ops (default: the fastest that runs)")
    parser.add_argument("--no-tests", action="store_true", help="only time them")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            sites = build(options.base, Path(folder))
        except subprocess.CalledProcessError as error:
            print(
                f"compare_commits.py: {' '.join(map(str, error.cmd[:4]))} failed:\n{error.stderr.decode()}",
                file=sys.stderr,
            )
            return 1
        if not options.no_tests:
            for name, (tree, site) in sites.items():
                if not passes(tree, site, options.ops):
                    print(f"compare_commits.py: the tests of {name} fail; nothing was timed", file=sys.stderr)
                    return 1
        times = measured([site for _, site in sites.values()], options.ops, options.backend, options.rounds)
    print(table(times))
    return 0 if times else 1


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be an integer >= 2, got {text!r}")
    return int(text)


def build(base: str, folder: Path) -> dict[str, tuple[Path, Path]]:
    """The source tree and the folder of the built package, of BASE and of the checkout."""
    tree = folder / "tree"
    run = partial(subprocess.run, check=True, capture_output=True)
    files = run(["git", "-C", ROOT, "archive", "--format=tar", base]).stdout
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        archive.extractall(tree, filter="data")
    sites = {base: (tree, folder / "base"), "the checkout": (ROOT, folder / "checkout")}
    settings = [] if torch.cuda.is_available() else ["-C", "cmake.define.QUIETSTAR_CUDA=OFF"]
    for source, site in sites.values():
        run([sys.executable, "-m", *INSTALL, site, *settings, source])
    return sites


def environment(site: Path) -> dict[str, str]:
    """Of a process that imports the package from ``site``."""
    return os.environ | {"PYTHONPATH": str(site)}


def passes(tree: Path, site: Path, ops: Iterable[str]) -> bool:
    """Whether the tests of ``ops`` in ``tree`` pass with the package in ``site``."""
    files = [f"tests/ops/{name}" for op in ops for name in TESTS[op] if (tree / "tests" / "ops" / name).exists()]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, cwd=tree, env=environment(site)).returncode == 0


def measured(
    sites: Sequence[Path], ops: Sequence[str], backend: str | None, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of every case that both run, in BASE and in the checkout, taken in turns."""
    workers = [Worker(site, ops, backend) for site in sites]
    try:
        names = [name for name in workers[0].names if name in workers[1].names]
        times = {name: ([], []) for name in names}
        for name in names:
            for number in range(rounds):
                for side in (0, 1) if number % 2 else (1, 0):
                    times[name][side].append(workers[side].seconds(name))
        return times
    finally:
        for worker in workers:
            worker.process.kill()


class Worker:
    """A process that times the package of one folder."""

    def __init__(self, site: Path, ops: Sequence[str], backend: str | None):
        command = [sys.executable, "-P", __file__, "--worker", backend or "", *ops]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(site)
        )
        self.names: list[str] = self._answer()

    def seconds(self, name: str) -> float:
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> object:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process that times a package ended with exit code {self.process.wait()}")
        return json.loads(line)


def work(backend: str | None, ops: Sequence[str]) -> None:
    """What a ``Worker`` does: say which cases run, then time those that it is asked for."""
    sys.path.insert(0, str(Path(__file__).parent))
    from commit_cases import cases
    from measure import keep_freed_memory, seconds

    keep_freed_memory()
    runnable: dict[str, Callable[[], object]] = {}
    for name, call in cases(ops, backend).items():
        try:
            call()
        except (TypeError, ValueError) as error:  # an argument that BASE does not have, a backend that does not run
            print(f"{name} left out: {error}", file=sys.stderr)
        else:
            runnable[name] = call
    print(json.dumps(list(runnable)), flush=True)
    for line in sys.stdin:
        print(json.dumps(seconds(runnable[line.strip()])), flush=True)


def table(times: dict[str, tuple[list[float], list[float]]]) -> str:
    """Markdown: medians, and the ratio of BASE over the checkout with its spread."""
    lines = ["| case | BASE | checkout | ratio | |", "|---|---:|---:|---:|---|"]
    for name, (base, ours) in times.items():
        ratios = [before / after for before, after in zip(base, ours, strict=True)]
        lower, ratio, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        verdict = "faster" if lower > 1 else "slower" if upper < 1 else "no difference"
        before, after = (f"{statistics.median(each) * 1e3:.3g} ms" for each in (base, ours))
        lines.append(f"| {name} | {before} | {after} | {ratio:.2f} ({lower:.2f} … {upper:.2f}) | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2] or None, sys.argv[3:])
    else:
        sys.exit(main())
