"""Whether a run on a GPU keeps what is promised there: one line for each promise, and for each peer.

    python benchmarks/promises.py RESULTS.json       what `pytest benchmarks --benchmark-only --benchmark-json` wrote

Every peer of every benchmark of the fused kernels is promised to be no faster. Amounts are those of an H200; an H100
SXM has the same matrix units, so they hold there too, but not those that its slower memory has a part in.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from comparison import OURS
from report import ReportError, load

H200, H100 = "H200", "H100 80GB HBM3"  # of what the driver calls devices
SAME_UNITS = H200, H100


class Promise(NamedTuple):
    """Of one benchmark."""

    what: str
    tflops: float | None = None
    """At least."""
    milliseconds: float | None = None
    """At most."""
    devices: Sequence[str] = SAME_UNITS
    """On which, by a part of their name."""
    ratios: Mapping[str, float] = {}
    """How many times faster than some peers; otherwise it is once."""


# By the name of the benchmark, without "bench_".
PROMISES = {
    "thought_attention[triton-forward, L = 2048]": Promise(
        "forward, L = 2048, bf16", tflops=520, ratios={"FlashAttention-3 + merge": 1.3}
    ),
    "thought_attention[triton-forward, L = 4096]": Promise("forward, L = 4096, bf16", tflops=620),
    "thought_attention[triton-backward, L = 2048]": Promise("backward, L = 2048, bf16", tflops=420),
    "thought_attention[triton-backward, L = 4096]": Promise("backward, L = 4096, bf16", tflops=500),
    "cross_entropy[triton-mixed_linear-2048]": Promise(
        "mixed head, 2048 x 4096 x 32000, bf16", milliseconds=2.3, devices=(H200,)
    ),
    "cross_entropy[triton-mixed_linear-16384]": Promise(
        "mixed head, 16384 x 4096 x 32000, bf16", tflops=700, devices=(H200,)
    ),
}


def lines(results: Mapping, selected: Iterable[str] = ()) -> Iterator[str]:
    """What became of the promises, and of the benchmarks beside them.

    Args:
        results: of a run, as ``report.load`` gives them.
        selected: names of benchmarks that should have run.
    """
    found = {each["name"].removeprefix("bench_"): each["extra_info"] for each in results["benchmarks"]}
    device = results["machine_info"]["device"]
    for name in dict.fromkeys([*PROMISES, *selected, *found]):
        promise = PROMISES.get(name, Promise(name))
        if name in found and "candidates" in found[name]:
            yield from _of_benchmark(promise, found[name], device)
        elif name not in found:
            reason = results["not_run"].get(name, "it was not begun")
            yield f"{promise.what}: not measured: {reason}"


def _of_benchmark(promise: Promise, found: Mapping, device: str) -> Iterator[str]:
    ours = found["candidates"][OURS]
    where = any(name in device for name in promise.devices)
    elsewhere = f"promised on {' and '.join(promise.devices)} only, this is {device}"
    if promise.tflops is not None:
        speed = ours["gflop_per_s"] / 1e3
        kept = verdict(speed >= promise.tflops) if where else elsewhere
        yield f"{promise.what}: {speed:.0f} TFLOP/s, promised {promise.tflops:g}: {kept}"
    if promise.milliseconds is not None:
        kept = verdict(ours["median_ms"] <= promise.milliseconds) if where else elsewhere
        yield f"{promise.what}: {ours['median_ms']:.2f} ms, promised {promise.milliseconds:g}: {kept}"
    for peer, numbers in found["candidates"].items():
        if peer != OURS:
            ratio, promised = numbers["median_ratio"], promise.ratios.get(peer, 1)
            yield f"{promise.what}: {ratio:.2f}x {peer}, promised {promised:g}: {verdict(ratio >= promised)}"
    for peer, reason in found["missing"].items():
        yield f"{promise.what}: not compared with {peer}: {reason}"


def verdict(kept: bool) -> str:
    return "holds" if kept else "does NOT hold"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 also where promises do not hold."""
    parser = argparse.ArgumentParser(
        prog="promises.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    options = parser.parse_args(arguments)
    try:
        results = load(options.results)
    except ReportError as error:
        print(f"promises.py: {error}", file=sys.stderr)
        return 1
    print(*lines(results), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
