"""From the times of ours and its peers to the numbers that are reported; how those are written is in ``report``."""

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from math import log
from typing import NamedTuple

import torch
from measure import copy_peak, matmul_peak, seconds

OURS = "ours"


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[..., float] = seconds
) -> dict[str, list[float]]:
    """Seconds of each call, ``rounds`` for each candidate: what slows the machine down for a while slows them all."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            times[name].append(clock(candidate))
    return times


def spread(times: Sequence[float]) -> float | None:
    """Interquartile range as a fraction of the median; None of fewer than two times."""
    if len(times) < 2:
        return None
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return (upper - lower) / median


def summary(
    times: Mapping[str, Sequence[float]],
    *,
    promised: float | None = None,
    memory: Mapping[str, int] | None = None,
    flops: float | None = None,
    dtype: torch.dtype = torch.float32,
    moved: float | None = None,
    missing: Mapping[str, str] | None = None,
    shape: Mapping[str, object] | None = None,
    less_work: Collection[str] = (),
) -> dict:
    """What a comparison found, ready for JSON. ``times`` are those of ``interleaved``, the rest as in ``compare``.

    Ratios are times of the candidate over ours: above 1, ours is the faster one. ``spread`` is the interquartile range
    over the median. Fractions are of ``matmul_peak`` and ``copy_peak``, measured now.
    """
    peers = [name for name in times if name != OURS]
    memory, missing = memory or {}, missing or {}
    for argument, names in (("memory", memory), ("less_work", less_work)):
        if unknown := set(names) - set(times):
            raise ValueError(f"{argument} must name what is timed ({', '.join(times)}), got {sorted(unknown)}")
    if contradiction := set(missing) & set(times):
        raise ValueError(f"missing must name what is not timed, got {sorted(contradiction)}")
    ours_median, ours_best = statistics.median(times[OURS]), min(times[OURS])
    candidates = {}
    for name in (OURS, *peers):
        median, best = statistics.median(times[name]), min(times[name])
        candidates[name] = {
            "median_ms": median * 1e3,
            "median_ratio": median / ours_median,
            "spread": spread(times[name]),
            "best_ms": best * 1e3,
            "best_ratio": best / ours_best,
            "promised_ratio": promised if [name] == peers[:1] else None,
            "peak_mib": memory[name] / 2**20 if name in memory else None,
            "gflop_per_s": flops / median / 1e9 if flops else None,
            "matmul_fraction": flops / median / matmul_peak(dtype) if flops else None,
            "gb_per_s": moved / median / 1e9 if moved else None,
            "copy_fraction": moved / median / copy_peak() if moved else None,
        }
    equals = [name for name in peers if name not in less_work]
    best_peer = min(equals, key=lambda name: candidates[name]["median_ms"], default=None)
    return {
        "shape": dict(shape or {}),
        "candidates": candidates,
        "missing": dict(missing),
        "best_peer": best_peer,
        "best_peer_ratio": candidates[best_peer]["median_ratio"] if best_peer else None,
    }


class Case(NamedTuple):
    """One size of a sweep."""

    runs: Mapping[str, Callable[[], object]]
    """Candidates whose answers were found right, ours under "ours"."""
    memory: Mapping[str, int]
    """Bytes by name."""
    missing: Mapping[str, str]
    work: float
    """FLOPs or bytes that the task takes at the least: what time should grow with."""
    results: float
    """Bytes of results: what memory should grow with."""


def exponent(sizes: Sequence[int], values: Sequence[float | None]) -> float | None:
    """Of the power law that fits best: the slope of a least-squares line through the logarithms.

    Values that are None are left out; None if fewer than two remain.
    """
    points = [(log(size), log(value)) for size, value in zip(sizes, values, strict=True) if value is not None]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else None


def growth(
    variable: str,
    cases: Mapping[int, Case],
    times: Mapping[int, Mapping[str, Sequence[float]]],
    shape: Mapping[str, object],
) -> dict:
    """How time and memory of each candidate grow over a sweep, and how they should; ready for JSON.

    ``cases`` and ``times``, those of ``interleaved``, are by size. A candidate has None where it could not run.
    """
    sizes = list(cases)
    names = dict.fromkeys(name for each in times.values() for name in each)
    candidates = {}
    for name in (OURS, *(names.keys() - {OURS})):
        medians = [statistics.median(times[size][name]) * 1e3 if name in times[size] else None for size in sizes]
        peaks = [cases[size].memory[name] / 2**20 if name in times[size] else None for size in sizes]
        candidates[name] = {
            "median_ms": medians,
            "peak_mib": peaks,
            "time_exponent": exponent(sizes, medians),
            "memory_exponent": exponent(sizes, peaks),
        }
    work, results = [case.work for case in cases.values()], [case.results for case in cases.values()]
    ideal = {
        "work": work,
        "results": results,
        "time_exponent": exponent(sizes, work),
        "memory_exponent": exponent(sizes, results),
    }
    reasons = {name: f"at {variable} = {size}: {why}" for size in sizes for name, why in cases[size].missing.items()}
    return {
        "shape": dict(shape),
        "missing": reasons,
        "sweep": {"variable": variable, "sizes": sizes, "candidates": candidates, "ideal": ideal},
    }
