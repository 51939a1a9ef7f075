"""``compare``: time ours and its peers in turn, and a table of all comparisons at the end of the run."""

import statistics
from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
from measure import DEVICE, THREADS, matmul_peak, seconds, settle, to_the_end

ROWS = pytest.StashKey[list[tuple[str, ...]]]()
HEADER = (
    "benchmark",
    "candidate",
    "median ms",
    "x ours",
    "best ms",
    "x ours",
    "promised",
    "peak MiB",
    "GFLOP/s",
    "of matmul",
)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def compare(benchmark, request) -> Callable[..., None]:
    """A function that times ours against its peers; results go to the table below and to ``extra_info``."""

    def compare(
        ours: Callable[[], object],
        peers: Mapping[str, Callable[[], object]],
        *,
        rounds: int,
        promised: float | None = None,
        memory: Mapping[str, int] | None = None,
        flops: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Each round runs every peer, then ours. The best times say most on a machine that others use too.

        Args:
            ours: one call is one measurement. Call it once before, for the check of its answer: nothing is warmed up.
            peers: the same work done otherwise, by name.
            rounds: how many.
            promised: how many times faster than its first peer ours has to be.
            memory: peak bytes by name, ours under "ours".
            flops: floating-point operations of the task, not counting what a candidate does in vain.
            dtype: that of the matrix products ``flops`` is compared with.
        """
        times: dict[str, list[float]] = {name: [] for name in peers}

        def peers_first() -> None:
            for name, peer in peers.items():
                times[name].append(seconds(peer))
            settle()

        benchmark.pedantic(to_the_end(ours), setup=peers_first, rounds=rounds)
        if benchmark.stats is None:  # --benchmark-disable
            return
        times["ours"] = benchmark.stats.stats.data
        for name in ("ours", *peers):
            median, best = statistics.median(times[name]), min(times[name])
            benchmark.extra_info[name] = result = {
                "median_ms": median * 1e3,
                "median_ratio": median / statistics.median(times["ours"]),
                "best_ms": best * 1e3,
                "best_ratio": best / min(times["ours"]),
                "promised_ratio": promised if name == next(iter(peers)) else None,
                "peak_mib": memory[name] / 2**20 if memory else None,
                "gflop_per_s": flops / median / 1e9 if flops else None,
                "matmul_fraction": flops / median / matmul_peak(dtype) if flops else None,
            }
            formats = ("{:.2f}", "{:.2f}", "{:.2f}", "{:.2f}", ">= {:g}", "{:.0f}", "{:.0f}", "{:.1%}")
            cells = ("" if x is None else f.format(x) for f, x in zip(formats, result.values(), strict=True))
            request.config.stash[ROWS].append((request.node.name.removeprefix("bench_"), name, *cells))

    return compare


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {THREADS} threads"
    terminalreporter.section(f"ours and its peers, interleaved; {machine}; torch {torch.__version__}")
    terminalreporter.write_line("peak MiB: of a process that does only this, Python and torch included unless on a GPU")
    for line in _aligned([HEADER, *rows]):
        terminalreporter.write_line(line)


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines of a table whose first two columns are text."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = [f"{{:<{width}}}" if i < 2 else f"{{:>{width}}}" for i, width in enumerate(widths)]
    return ["  ".join(texts).format(*row) for row in rows]
