"""``compare``: time ours and its peers in turn; a table of all comparisons at the end of the run, and all in JSON."""

import dataclasses
import shlex
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence

import pytest
import torch
from comparison import OURS, Case, growth, interleaved, summary
from measure import DEVICE, keep_freed_memory, machine, seconds
from report import FORMAT

RESULTS = pytest.StashKey[dict[str, dict]]()
NOT_RUN = pytest.StashKey[dict[str, str]]()
COLUMNS = {
    "median ms": ("median_ms", "{:.2f}"),
    "spread": ("spread", "{:.0%}"),
    "x ours": ("median_ratio", "{:.2f}"),
    "best ms": ("best_ms", "{:.2f}"),
    "x ours, best": ("best_ratio", "{:.2f}"),
    "promised": ("promised_ratio", ">= {:.3g}"),
    "peak MiB": ("peak_mib", "{:.0f}"),
    "GFLOP/s": ("gflop_per_s", "{:.0f}"),
    "of matmul": ("matmul_fraction", "{:.1%}"),
    "GB/s": ("gb_per_s", "{:.1f}"),
    "of copy": ("copy_fraction", "{:.1%}"),
}


class Clock:
    """A stopped clock that ``measured`` moves on: pytest-benchmark's statistics are then of ``measure.seconds``."""

    now = 0.0

    def read(self) -> float:
        return self.now

    def measured(self, function: Callable[[], object]) -> None:
        self.now += seconds(function)


CLOCK = Clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep-memory", action="store_true", help="let whole programs, too, keep the memory they free")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--keep-memory"):
        keep_freed_memory()
    config.stash[RESULTS] = {}
    config.stash[NOT_RUN] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "memory_kept" in getattr(item, "fixturenames", ()))
    for item in items:
        if {"compare", "sweep"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK.read))
        if item.get_closest_marker("gpu") and DEVICE != "cuda":
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def memory_kept() -> None:
    """For ops: what one frees is there for its next call. Whole programs come first, and as users start them."""
    keep_freed_memory()


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
        moved: float | None = None,
        missing: Mapping[str, str] | None = None,
        shape: object | None = None,
        less_work: Collection[str] = (),
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
            moved: bytes that the task has to read and write, not counting what a candidate moves in vain.
            missing: peers that could not be timed, and why.
            shape: dataclass of ``shapes``, for the report.
            less_work: peers that do only a part of the work, and so are not asked which is the best.
        """
        times = _timed(benchmark, ours, peers, rounds)
        if benchmark.stats is None:  # --benchmark-disable
            return
        benchmark.extra_info |= summary(
            times,
            promised=promised,
            memory=memory,
            flops=flops,
            dtype=dtype,
            moved=moved,
            missing=missing,
            shape=_described(shape),
            less_work=less_work,
        )
        request.config.stash[RESULTS][_short(request.node)] = benchmark.extra_info

    return compare


@pytest.fixture
def sweep(benchmark, request) -> Callable[..., None]:
    """A function that times ours and its peers at growing sizes; results go to where those of ``compare`` go."""

    def sweep(
        variable: str, sizes: Sequence[int], case: Callable[[int], Case], *, rounds: int, shape: object | None = None
    ) -> None:
        """The statistics of pytest-benchmark are those of the largest size.

        Args:
            variable: name of what grows, a field of ``shape`` if that has it.
            sizes: its values, growing.
            case: makes and checks the candidates of a size.
            rounds: how many times each of them runs.
            shape: dataclass of ``shapes``, for the report.
        """
        cases, times = {}, {}
        for size in sizes:
            cases[size] = case(size)
            runs = dict(cases[size].runs)
            last = size == sizes[-1]
            times[size] = _timed(benchmark, runs.pop(OURS), runs, rounds) if last else interleaved(runs, rounds)
            cases[size] = cases[size]._replace(runs={})  # lets go of its tensors
        if benchmark.stats is None:  # --benchmark-disable
            return
        fixed = {field: value for field, value in _described(shape).items() if field != variable}
        benchmark.extra_info |= growth(variable, cases, times, fixed)
        request.config.stash[RESULTS][_short(request.node)] = benchmark.extra_info

    return sweep


def _timed(benchmark, ours: Callable, peers: Mapping[str, Callable], rounds: int) -> dict[str, list[float]]:
    """As ``interleaved``, ours last in each round and through pytest-benchmark."""
    times: dict[str, list[float]] = {name: [] for name in (OURS, *peers)}

    def peers_first() -> None:
        for name, [time] in interleaved(peers, rounds=1).items():
            times[name].append(time)

    benchmark.pedantic(CLOCK.measured, args=(ours,), setup=peers_first, rounds=rounds)
    if benchmark.stats is not None:
        times[OURS] = benchmark.stats.stats.data
    return times


def _described(shape: object | None) -> dict[str, str]:
    return {key: str(value) for key, value in dataclasses.asdict(shape).items()} if shape else {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped:
        reason = report.longrepr[2].removeprefix("Skipped: ").replace(f"{item.config.rootpath}/", "")
        if "cannot run" in reason:  # of a backend: only why, so that the same is said once for all ops
            reason = reason.partition(" here: ")[2].partition("; usable here: ")[0]
        item.config.stash[NOT_RUN][_short(item)] = reason
    elif report.failed:
        item.config.stash[NOT_RUN][_short(item)] = "FAILED"
    return report


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info.clear()  # pytest-benchmark's names the host
    machine_info.update(machine())


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    output_json |= {
        "format": FORMAT,
        "command": shlex.join(["pytest", *config.invocation_params.args]),
        "not_run": config.stash[NOT_RUN],
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not results:
        return
    about = machine()
    threads = f", {about['threads']} threads" if DEVICE == "cpu" else ""
    write = terminalreporter.write_line
    terminalreporter.section(f"ours and its peers, interleaved; {about['device']}{threads}; torch {about['torch']}")
    write("spread: interquartile range over median; best peer: by the median, a ratio above 1 is ours being faster")
    write("peak MiB: on a CPU of a process that does only this, Python and torch included; on a GPU what is allocated")
    compared = {name: result for name, result in results.items() if "candidates" in result}
    rows = [("benchmark", "candidate", *COLUMNS)]
    for benchmark, result in compared.items():
        for name, numbers in result["candidates"].items():
            cells = ("" if numbers[key] is None else text.format(numbers[key]) for key, text in COLUMNS.values())
            rows.append((benchmark, name, *cells))
    for line in _aligned(rows) if compared else ():
        write(line)
    for benchmark, result in compared.items():
        if result["best_peer"]:
            write(f"best peer of {benchmark}: {result['best_peer']}, {result['best_peer_ratio']:.2f} x ours")
    for benchmark, result in results.items():
        for name, numbers in result.get("sweep", {"candidates": {}})["candidates"].items():
            write(f"{benchmark}: {name} {_exponents(numbers)}; ideal {_exponents(result['sweep']['ideal'])}")
    for benchmark, result in results.items():
        for name, reason in result["missing"].items():
            write(f"missing peer of {benchmark}: {name} ({reason})")
    for name, reason in config.stash[NOT_RUN].items():
        write(f"not run: {name} ({reason})")


def _exponents(numbers: Mapping[str, float | None]) -> str:
    words = (("time", numbers["time_exponent"]), ("memory", numbers["memory_exponent"]))
    return ", ".join(f"{what} {'unknown' if power is None else f'~ size^{power:.2f}'}" for what, power in words)


def _short(item: pytest.Item) -> str:
    return item.name.removeprefix("bench_")


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines of a table whose first two columns are text."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = [f"{{:<{width}}}" if i < 2 else f"{{:>{width}}}" for i, width in enumerate(widths)]
    return ["  ".join(texts).format(*row) for row in rows]
