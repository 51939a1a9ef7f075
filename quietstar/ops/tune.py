"""Time launch parameters of all Triton kernels on the current GPU and print rows for their tables.

    python -m quietstar.ops.tune --minutes 6 --output rows.txt

Tuning happens only in this command, never during training. It tries the most promising candidates of every table first,
then others until none is left or the time is up. Each row is printed with its measurements. Rows apply to the given
head size, vocabulary and dtype. ``tests/ops/test_*_compile.py`` check, without a GPU, whether new rows fit.
"""

import argparse
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import torch

from quietstar.ops._tuning import Outcome, Row, Subject, Trial, in_table, search

OPS = "thought_attention", "linear_cross_entropy", "linear_sample", "mixing"
DTYPES = "float16", "bfloat16", "float32"


class Sizes(NamedTuple):
    """Sizes of typical calls; the defaults are those of a model with seven billion parameters."""

    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    shared_memory: int = 227 << 10
    """Bytes of shared memory that a program can use on the device."""
    length: int = 4096
    """L, also the number of anchors."""
    steps: int = 14
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    decoding: int = 8
    """Batch size in decoding."""
    rows: int = 4096
    """Rows of the vocabulary's ops."""
    hidden_size: int = 4096
    vocabulary: int = 32002


def subjects(ops: Sequence[str], sizes: Sizes) -> list[Subject]:
    """Return everything that can be tuned for the given ops."""
    from quietstar.ops.linear_cross_entropy import triton_tune as linear_cross_entropy
    from quietstar.ops.linear_sample import triton_tune as linear_sample
    from quietstar.ops.mixing import triton_tune as mixing
    from quietstar.ops.thought_attention import triton_tune as thought_attention

    modules = dict(zip(OPS, (thought_attention, linear_cross_entropy, linear_sample, mixing), strict=True))
    return [subject for op in ops for subject in modules[op].subjects(sizes)]


class Gpu:
    """The current device, as a :class:`._tuning.Machine`."""

    def __init__(self, together: int):
        self.together = together
        self._compilers = ThreadPoolExecutor(together)

    def now(self) -> float:
        return monotonic()

    def compile(self, wave: Sequence[tuple[Subject, Row]], seconds: float) -> list[bool]:
        from triton import AsyncCompileMode

        end, launched = monotonic() + seconds, []
        with AsyncCompileMode(self._compilers, ignore_errors=True) as compiling:
            for subject, row in wave:
                with in_table(subject, row), _launches(only_compile=True) as kernels:
                    try:
                        subject.run()
                    except Exception:  # any error of the compiler or launcher rejects the candidate
                        kernels.append(None)
                launched.append(kernels)
            wait(compiling.raw_futures, max(0.0, end - monotonic()))
            compiling.raw_futures = [future for future in compiling.raw_futures if future.done() or future.cancel()]
        # A kernel compiled in the background is wrapped in an object that holds it once it is ready.
        return [all(getattr(kernel, "kernel", None) is not None for kernel in kernels) for kernels in launched]

    def outcome(self, subject: Subject) -> Outcome:
        with _launches(only_compile=False) as kernels:
            results = subject.results()
        torch.cuda.synchronize()
        spilled = max((kernel.n_spills for kernel in kernels), default=0)
        return Outcome(results, spilled, {kernel.name for kernel in kernels})

    def milliseconds(self, subject: Subject) -> float:
        from triton.testing import do_bench

        return do_bench(subject.run, return_mode="median")


@contextmanager
def _launches(only_compile: bool) -> Iterator[list]:
    """Collect the kernels launched inside the context (with ``only_compile``, those that would be launched)."""
    from triton.runtime.jit import JITFunction

    kernels, run = [], JITFunction.run

    def launch(self, *args, warmup, **options):
        kernels.append(run(self, *args, warmup=warmup or only_compile, **options))
        return kernels[-1]

    JITFunction.run = launch
    try:
        yield kernels
    finally:
        JITFunction.run = run


def report(trials: Sequence[Trial], origin: str) -> str:
    """Format rows for the tables, each below the name of its table."""
    lines = [f"# {origin}"]
    for table, found in groupby(trials, key=lambda trial: trial.subject.table):
        lines += [f"# {table}", *(trial.line() for trial in found)]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Create the command-line parser."""
    command = argparse.ArgumentParser(
        prog="python -m quietstar.ops.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--minutes", type=float, default=6.0, help="total time limit (default: %(default)s)")
    command.add_argument("--output", type=Path, help="also write the rows to this file")
    command.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="tune only these ops")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype to tune for (default: %(default)s)")
    command.add_argument(
        "--head-size", type=int, default=Sizes().head_size, help="size of an attention head (default: %(default)s)"
    )
    command.add_argument(
        "--vocabulary", type=int, default=Sizes().vocabulary, help="vocabulary size (default: %(default)s)"
    )
    return command


def main(arguments: Sequence[str] | None = None, machine: Callable[[int], Gpu] = Gpu) -> int:
    """Run the command and return its exit code."""
    command = parser()
    options = command.parse_args(arguments)
    begin = monotonic()
    if not options.minutes > 0:
        command.error(f"--minutes must be above 0, got {options.minutes}")
    if not 1 <= options.head_size <= 256:
        command.error(f"--head-size must be from 1 to 256, got {options.head_size}")
    if options.vocabulary < 1:
        command.error(f"--vocabulary must be at least 1, got {options.vocabulary}")
    if not torch.cuda.is_available():
        command.error("needs a GPU, and PyTorch finds none here: it times kernels")
    try:
        import triton
    except ImportError as error:
        command.error(f"needs Triton: {error}")
    if options.output is not None:
        try:
            options.output.touch()
        except OSError as error:
            command.error(f"--output {options.output}: {error.strerror}")
    sizes = Sizes(
        dtype=getattr(torch, options.dtype),
        shared_memory=_shared_memory(),
        head_size=options.head_size,
        vocabulary=options.vocabulary,
    )
    what = subjects(options.ops, sizes)
    trials = search(what, 60 * options.minutes - (monotonic() - begin), machine(os.cpu_count() or 1))
    tried, all_of_them = sum(trial.tried for trial in trials), sum(trial.tried + trial.waiting for trial in trials)
    call = " ".join(["python -m quietstar.ops.tune", *(sys.argv[1:] if arguments is None else arguments)])
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    origin = (
        f"{call}: {tried} of {all_of_them} candidates in {monotonic() - begin:.0f} s; "
        f"{torch.cuda.get_device_name()}, {versions}, {datetime.datetime.now(datetime.UTC).date()}"
    )
    text = report(trials, origin)
    print(text, end="", flush=True)
    if options.output is not None:
        options.output.write_text(text)
    return int(not any(trial.times for trial in trials))


def _shared_memory() -> int:
    """Bytes of shared memory that a program can use on the current device."""
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # a normal exit would wait for background compilations
