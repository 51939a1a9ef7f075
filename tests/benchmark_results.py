"""Results of benchmarks that nobody has run."""

from report import FORMAT


def results(device="NVIDIA H200", not_run=None, **benchmarks):
    """As pytest writes them; of each benchmark the time in ms, TFLOP/s, ratios of peers and reasons of missing ones."""
    return {
        "format": FORMAT,
        "command": "pytest benchmarks --benchmark-only",
        "datetime": "2026-01-02T03:04:05+00:00",
        "machine_info": {"device": device, "kind": "cuda"},
        "commit_info": {},
        "not_run": not_run or {},
        "benchmarks": [
            {"name": f"bench_{name}", "extra_info": _benchmark(**found)} for name, found in benchmarks.items()
        ],
    }


def _benchmark(ms=1.0, tflops=None, peers=None, missing=None):
    ours = {"median_ms": ms, "median_ratio": 1.0, "gflop_per_s": tflops and 1e3 * tflops}
    others = {name: {"median_ms": ratio * ms, "median_ratio": ratio} for name, ratio in (peers or {}).items()}
    return {"candidates": {"ours": ours, **others}, "missing": missing or {}}
