"""Markdown tables and plots from what ``pytest benchmarks --benchmark-only --benchmark-json=RESULTS.json`` wrote.

    python benchmarks/report.py RESULTS.json [...]                            tables, to the terminal
    python benchmarks/report.py RESULTS.json [...] --pages docs/benchmarks    a page for each device
    python benchmarks/report.py RESULTS.json [...] --plots FOLDER             also a PNG for each sweep (matplotlib)

The exit code is 0 unless a file could not be read or written; what a run left out is said in the tables.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

FORMAT = 1  # of the JSON; raise it when a reader of the last one would misunderstand
KEYS = "machine_info", "commit_info", "datetime", "command", "not_run", "benchmarks"
LEGEND = (
    "Times are medians ± half the interquartile range; all candidates take turns in one run. A ratio is the peer's "
    "time divided by ours. Peaks are those of a large matrix product and a large copy on the same machine in the same "
    "run. Peak memory is that of ours / of the best peer, on a CPU of the whole process. Ops reuse memory that was "
    "freed; whole programs (the training step, generation) get theirs from the system, unless the command says "
    "--keep-memory."
)


class ReportError(Exception):
    """A file is not what it should be; the message names it."""


def load(path: Path) -> dict:
    """Results of one run, checked for their format."""
    try:
        return checked(json.loads(path.read_text()), path)
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{path}: not JSON ({error})") from error


def checked(results: object, path: Path) -> dict:
    """What was read from a file, if it is all the results of a run."""
    version = results.get("format") if isinstance(results, dict) else None
    if version != FORMAT:
        found = f"its format is {version}" if version is not None else "it has no format number"
        raise ReportError(f"{path}: results of format {FORMAT} expected, {found}: measure again with these benchmarks")
    if lacking := [key for key in KEYS if key not in results]:
        raise ReportError(f"{path}: not all results of a run, it has no {', '.join(lacking)}")
    return results


def documents(files: Mapping[str, dict]) -> dict[str, str]:
    """Markdown of several runs, by device; ``files`` are by the names under which they are referred to."""
    devices: dict[str, list[str]] = {}
    for source, results in files.items():
        devices.setdefault(device(results), []).append(section(results, source))
    return {name: "\n\n".join([f"# {name}", LEGEND, *parts]) + "\n" for name, parts in devices.items()}


def section(results: dict, source: str) -> str:
    """All that a run found, as Markdown; ``source`` is how its file is referred to."""
    benchmarks = {each["name"].removeprefix("bench_"): each["extra_info"] for each in results["benchmarks"]}
    compared = {name: found for name, found in benchmarks.items() if "candidates" in found}
    sweeps = {name: found for name, found in benchmarks.items() if "sweep" in found}
    blocks = [
        origin(results, source),
        table(OVERVIEW, (overview_row(name, found) for name, found in compared.items())),
        table(GROWTH, (row for name, found in sweeps.items() for row in growth_rows(name, found))),
        left_out(benchmarks, results["not_run"]),
        details(compared),
    ]
    return "\n\n".join(block for block in blocks if block)


def device(results: dict) -> str:
    machine = results["machine_info"]
    return f"{machine['device']}, {machine['threads']} threads" if machine["kind"] == "cpu" else machine["device"]


def origin(results: dict, source: str) -> str:
    """Versions, date, commit and command."""
    machine, commit = results["machine_info"], results["commit_info"]
    versions = [f"{name} {machine[name]}" for name in ("quietstar", "torch", "triton", "transformers") if machine[name]]
    state = " with uncommitted changes" if commit.get("dirty") else ""
    made = f"commit {commit['id'][:8]}{state}" if commit.get("id") else "no commit"
    return (
        f"{', '.join(versions)}, Python {machine['python']}; {results['datetime'][:10]}, {made}; "
        f"`{results['command']}`; `{source}`."
    )


OVERVIEW = "benchmark", "shape", "ours", "best peer", "its time", "ratio", "promise", "speed of ours", "peak memory"


def overview_row(name: str, found: dict) -> tuple[str, ...]:
    """Ours and the best peer."""
    ours, best = found["candidates"]["ours"], found["best_peer"]
    peer = found["candidates"].get(best, {})
    promises = [
        f"{name}: {each['median_ratio']:.2f}, ≥ {each['promised_ratio']:.3g} promised"
        for name, each in found["candidates"].items()
        if each["promised_ratio"]
    ]
    memory = " / ".join(f"{each['peak_mib']:.0f}" for each in (ours, peer) if each.get("peak_mib"))
    return (
        f"`{name}`",
        shape_text(found["shape"]),
        f"{milliseconds(ours['median_ms'])} {spread(ours)}",
        best or "none",
        f"{milliseconds(peer['median_ms'])} {spread(peer)}" if peer else "",
        f"{found['best_peer_ratio']:.2f}" if peer else "",
        ", ".join(promises),
        speed(ours),
        f"{memory} MiB" if memory else "",
    )


DETAILS = "benchmark", "candidate", "median", "spread", "ratio", "best ratio", "speed", "peak MiB"


def details(compared: Mapping[str, dict]) -> str:
    """Every candidate, folded away."""
    rows = [
        (
            f"`{name}`",
            candidate,
            milliseconds(numbers["median_ms"]),
            spread(numbers),
            f"{numbers['median_ratio']:.2f}",
            f"{numbers['best_ratio']:.2f}",
            speed(numbers, both=True),
            f"{numbers['peak_mib']:.0f}" if numbers["peak_mib"] else "",
        )
        for name, found in compared.items()
        for candidate, numbers in found["candidates"].items()
    ]
    return f"<details><summary>Every candidate</summary>\n\n{table(DETAILS, rows)}\n\n</details>" if rows else ""


GROWTH = "growth of", "over", "candidate", "time grows as", "ideally", "memory grows as", "ideally", "at the largest"


def growth_rows(name: str, found: dict) -> Iterable[tuple[str, ...]]:
    sweep = found["sweep"]
    sizes, ideal = sweep["sizes"], sweep["ideal"]
    for candidate, numbers in sweep["candidates"].items():
        time, peak = numbers["median_ms"][-1], numbers["peak_mib"][-1]
        yield (
            f"`{name}`",
            f"{sweep['variable']} = {sizes[0]} … {sizes[-1]}",
            candidate,
            power(numbers["time_exponent"]),
            power(ideal["time_exponent"]),
            power(numbers["memory_exponent"]),
            power(ideal["memory_exponent"]),
            f"{milliseconds(time)}, {peak:.0f} MiB" if time is not None else "does not run",
        )


def left_out(benchmarks: Mapping[str, dict], not_run: Mapping[str, str]) -> str:
    """Peers and benchmarks that could not be run, each reason once."""
    reasons: dict[str, list[str]] = {}
    for name, found in benchmarks.items():
        for peer, reason in found["missing"].items():
            reasons.setdefault(f"{peer} ({code(reason)})", []).append(f"`{name}`")
    lines = [f"- Missing peer: {peer} in {', '.join(names)}." for peer, names in reasons.items()]
    reasons = {}
    for name, reason in not_run.items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    lines += [f"- Not run: {', '.join(names)} ({code(reason)})." for reason, names in reasons.items()]
    return "\n".join(lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, without columns in which nothing stands; nothing at all if there are no rows."""
    rows = list(rows)
    filled = [column for column in range(len(header)) if any(row[column] for row in rows)]
    lines = [[header[column] for column in filled], ["---"] * len(filled)]
    lines += [[row[column].replace("|", "\\|") for column in filled] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) if rows else ""


def shape_text(shape: Mapping[str, str]) -> str:
    named = {key: value for key, value in shape.items() if key not in ("dtype", "target")}
    words = [f"{key.replace('_', ' ')} {value}" for key, value in named.items()]
    return ", ".join([*words, shape["dtype"].removeprefix("torch.")] if "dtype" in shape else words)


def milliseconds(value: float) -> str:
    return f"{value / 1e3:.2f} s" if value >= 1e3 else f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def spread(numbers: Mapping[str, float | None]) -> str:
    return f"± {numbers['spread'] / 2:.0%}" if numbers["spread"] is not None else ""


def speed(numbers: Mapping[str, float | None], both: bool = False) -> str:
    """FLOP/s and bytes/s, or the one of them that is nearer to the machine's own peak."""
    found = []
    for rate, unit, fraction, peak in (
        ("gflop_per_s", "FLOP/s", "matmul_fraction", "matmul"),
        ("gb_per_s", "B/s", "copy_fraction", "copy"),
    ):
        if numbers[rate]:
            amount = f"{numbers[rate] / 1e3:.3g} T" if numbers[rate] >= 1e3 else f"{numbers[rate]:.3g} G"
            found.append((numbers[fraction], f"{amount}{unit}, {numbers[fraction]:.0%} of {peak}"))
    return "; ".join(text for _, text in (found if both else [max(found)] if found else []))


def power(exponent: float | None) -> str:
    return "unknown" if exponent is None else f"size^{exponent:.2f}"


def code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`"


def file_name(device: str) -> str:
    """Of a device's page."""
    return "-".join(re.findall(r"[a-z0-9]+", device.lower())) + ".md"


def plot(results: dict, name: str, folder: Path) -> list[Path]:
    """One PNG for each sweep: time against the ideal line, speed, and memory against the ideal line."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError(f"plots need matplotlib (pip install '.[bench]'): {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for benchmark in results["benchmarks"]:
        if "sweep" not in benchmark["extra_info"]:
            continue
        sweep = benchmark["extra_info"]["sweep"]
        sizes, ideal = sweep["sizes"], sweep["ideal"]
        figure = Figure(figsize=(13, 4), layout="constrained")
        times, speeds, memory = figure.subplots(1, 3)
        for candidate, numbers in sweep["candidates"].items():
            grows = {key: f"{candidate}, {power(numbers[f'{key}_exponent'])}" for key in ("time", "memory")}
            # matplotlib leaves gaps at NaN, not at None
            median, peak = ([float("nan") if x is None else x for x in numbers[k]] for k in ("median_ms", "peak_mib"))
            times.plot(sizes, median, "o-", label=grows["time"])
            rates = [work / time / 1e6 for work, time in zip(ideal["work"], median, strict=True)]
            speeds.plot(sizes, rates, "o-", label=candidate)
            memory.plot(sizes, peak, "o-", label=grows["memory"])
        ours = sweep["candidates"]["ours"]
        for axes, key, wanted in ((times, "time", ideal["work"]), (memory, "memory", ideal["results"])):
            # The ideal has no unit of its own in the left plot: the line goes through the last point of ours.
            scale = 1 / 2**20 if key == "memory" else ours["median_ms"][-1] / wanted[-1]
            line = [scale * amount for amount in wanted]
            axes.plot(sizes, line, "k--", label=f"ideal, {power(ideal[f'{key}_exponent'])}")
        for axes, title in (
            (times, "time, ms"),
            (speeds, "speed, GFLOP/s of the work needed"),
            (memory, "memory, MiB"),
        ):
            axes.set(title=title, xlabel=sweep["variable"], xscale="log", yscale="log")
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
            axes.legend()
        title = benchmark["name"].removeprefix("bench_")
        figure.suptitle(f"{title}; {results['machine_info']['device']}")
        written.append(folder / f"{name}-{title.replace('[', '-').rstrip(']')}.png")
        figure.savefig(written[-1], dpi=120)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--pages", type=Path, metavar="FOLDER", help="write a page for each device there")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write a PNG for each sweep there")
    options = parser.parse_args(arguments)

    failures, files = [], {}
    for path in options.results:
        try:
            results = load(path)
            files[path.as_posix()] = results
            if options.plots:
                for picture in plot(results, path.stem, options.plots):
                    print(picture, file=sys.stderr)
        except ReportError as error:
            failures.append(error)
    for name, text in documents(files).items():
        if not options.pages:
            print(text)
        elif not failures:  # else what stands there is better than a part of it
            options.pages.mkdir(parents=True, exist_ok=True)
            (options.pages / file_name(name)).write_text(text, encoding="utf-8")
    for failure in failures:
        print(f"report.py: {failure}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
