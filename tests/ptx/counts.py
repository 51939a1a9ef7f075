"""python -m tests.ptx.counts: what a GPU would have to do in launches of our kernels, counted in the emulator.

    python -m tests.ptx.counts                          # the table of all calls, for sm_80 and sm_90
    python -m tests.ptx.counts --call decoding          # of the calls with this in their name
    python -m tests.ptx.counts --write                  # after a change that is meant: counts.json and docs' table
    python -m tests.ptx.counts --check [--quick]        # exit status 1 if a count is not within 5 % of counts.json

Counts depend on the compiler, so counts.json names the version of Triton (and of nvcc) that it is of.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from .units import RATES, SECTOR, Work

TESTS = Path(__file__).parents[1]
KEPT = Path(__file__).with_name("counts.json")
PAGE = TESTS.parent / "docs/kernel_counts.md"
TOLERANCE = 0.05


class Row(NamedTuple):
    """A kernel in a call."""

    target: str
    call: str
    kernel: str
    work: Work
    need: tuple[int, int]
    """Need of ``counted_calls``."""

    @property
    def key(self) -> str:
        return f"{self.target} | {self.call} | {self.kernel}"


def compilers(cuda: bool = True) -> dict[str, str]:
    """Versions of what compiles the kernels; without nvcc none of it."""
    versions = {"triton": ".".join(metadata.version("triton").split(".")[:2])}
    if cuda and shutil.which("nvcc"):
        said = subprocess.run(["nvcc", "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
        versions["nvcc"] = re.search(r"release (\S+),", said)[1]
    return versions


def measure(target: str, names: list[str]) -> Iterator[Row]:
    """The kernels that calls of ``CALLS`` launch, as they are run.

    Raises:
        EmulationError: a kernel did what it must not do: its counts mean nothing.
    """
    from . import plugin
    from .counted_calls import CALLS
    from .kernel import EmulationError
    from .launches import recorded, schedule

    plugin.start(target)
    schedule.check_global = False  # other tests look for races, and it takes half of the time
    for name in names:
        call = CALLS[name]
        with recorded() as launches, _cuda_kernels(target) if call.cuda else contextlib.nullcontext():
            needs = call.run()
        work: dict[str, Work] = {}
        for launch in launches:
            if faults := launch.faults():
                raise EmulationError(f"{name}: {faults}")
            blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
            work[launch.name] = work.get(launch.name, Work()) + Work.of(launch.result.counts, blocks)
        for kernel, done in work.items():
            yield Row(target, name, kernel, done, needs.get(kernel, (0, 0)))


@contextlib.contextmanager
def _cuda_kernels(target: str) -> Iterator[None]:
    """Let ``backend="cuda"`` run, as on a GPU with all its multiprocessors."""
    import pytest
    from simt import use_cuda_kernels

    from quietstar.ops.thought_attention import backend_cuda

    from .plugin import PROCESSORS, TRITON

    with pytest.MonkeyPatch.context() as patch:
        use_cuda_kernels(patch)
        patch.setattr(backend_cuda, "processors", lambda device: PROCESSORS[TRITON[target]])
        yield


def differences(rows: list[Row], kept: dict[str, dict[str, int]]) -> list[str]:
    """What is not within 5 % of what is kept, in words; of the calls in ``rows`` alone."""
    calls = {(row.target, row.call) for row in rows}
    expected = {key: counts for key, counts in kept.items() if tuple(key.split(" | ")[:2]) in calls}
    found = {row.key: row.work._asdict() for row in rows}
    wrong = [f"{key}: launched, but not in {KEPT.name}" for key in found.keys() - expected.keys()]
    wrong += [f"{key}: in {KEPT.name}, but not launched" for key in expected.keys() - found.keys()]
    for key in found.keys() & expected.keys():
        for count, value in found[key].items():
            before = expected[key][count]
            if abs(value - before) > TOLERANCE * before:
                more = f"{value / before:.2f} times" if before else "not"
                wrong.append(f"{key}: {count} {value}, {more} the {before} of {KEPT.name}")
    return sorted(wrong)


# Units of which PTX says what they do. What ptxas makes of arithmetic may be fewer instructions, or more.
EXACT = ("matrix", "exp", "shared", "global")
COLUMNS = (
    "call", "kernel", "MFLOP", "issued / needed", "exp, k", "wavefronts, k", "/ least", "moved, KB", "/ least",
    "barriers", "instructions, k", *RATES["sm_80"], "bound", "peak at best",
)  # fmt: skip


def table(rows: list[Row]) -> str:
    """In Markdown: what was issued, and thousands of cycles by unit."""

    def ratio(part: float, whole: float) -> str:
        return f"{part / whole:.2f}" if whole else "–"

    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 4) + "---|---:|"]
    for row in rows:
        work, (flop, least_bytes) = row.work, row.need
        cycles = work.cycles(row.target)
        bound = max(EXACT, key=cycles.get)
        moved = work.sectors * SECTOR
        at_best = flop / RATES[row.target]["matrix"] / cycles[bound]
        cells = [
            row.call, f"`{row.kernel}`", f"{work.matrix_flop / 1e6:.1f}", ratio(work.matrix_flop, flop),
            f"{work.exp / 1e3:.1f}", f"{work.wavefronts / 1e3:.1f}", ratio(work.wavefronts, work.least_wavefronts),
            f"{moved / 1e3:.0f}", ratio(moved, least_bytes), f"{work.barriers}", f"{work.instructions / 1e3:.1f}",
            *(f"{each / 1e3:.1f}" for each in cycles.values()), bound, f"{at_best:.0%}" if flop else "–",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    from .counted_calls import CALLS, QUICK

    parser = argparse.ArgumentParser("python -m tests.ptx.counts", description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(RATES), action="append", help="default: both")
    parser.add_argument("--call", help="only calls with this in their name")
    parser.add_argument("--quick", action="store_true", help="only those of the default test")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help=f"compare with {KEPT.name}")
    action.add_argument("--write", action="store_true", help=f"write {KEPT.name} and docs/{PAGE.name}")
    options = parser.parse_args(arguments)
    targets = options.target or list(RATES)
    names = [name for name in (QUICK if options.quick else CALLS) if (options.call or "") in name]
    if not names:
        parser.error(f"--call must be part of a name of {list(CALLS)}, got {options.call!r}")
    if options.write and (len(names) < len(CALLS) or len(targets) < len(RATES)):
        parser.error("--write must be given alone: it writes all counts")
    cuda = any(CALLS[name].cuda for name in names)
    versions, kept = compilers(cuda), json.loads(KEPT.read_text()) if KEPT.exists() else None
    if cuda and "nvcc" not in versions:
        parser.error("nvcc must be on PATH to count CUDA kernels, got none")
    if options.check and any(kept["compilers"][name] != version for name, version in versions.items()):
        parser.error(f"compilers must be {kept['compilers']}, as for {KEPT.name}, got {versions}")

    rows = {target: list(measure(target, names)) for target in targets}
    everything = [row for each in rows.values() for row in each]
    if options.check:
        wrong = differences(everything, kept["counts"])
        for difference in wrong:
            print(difference)
        print(f"{len(everything)} kernels counted, {len(wrong)} counts differ by more than {TOLERANCE:.0%}")
        return 1 if wrong else 0
    tables = "\n\n".join(f"## {target}\n\n{table(each)}" for target, each in rows.items())
    if options.write:
        counts = {row.key: row.work._asdict() for row in everything}
        KEPT.write_text(json.dumps({"compilers": versions, "counts": counts}, indent=1) + "\n")
        head = PAGE.read_text().split("## ")[0]
        PAGE.write_text(f"{head}{tables}\n")
    else:
        print(tables)
    return 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before anything imports Triton
    sys.path.insert(0, str(TESTS))
    sys.exit(main())
