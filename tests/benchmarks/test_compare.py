"""Comparisons: the numbers made of times, the gates before them, and what a run writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_linear_cross_entropy as head
import bench_linear_sample as sampling
import bench_mixing as mixing
import bench_thought_attention as attention
import comparison
import pytest
import torch
from comparison import Case
from report import FORMAT
from shapes import HeadShape, LogitsShape, ThoughtAttentionShape

ROOT = Path(__file__).parents[2]
SHAPE = ThoughtAttentionShape(2, 12, 3, 4, 2, 16, torch.float32, target=None)
TIMES = {"ours": [1.0, 2.0, 3.0], "slow": [6.0, 4.0, 2.0], "fast": [0.5, 3.0, 3.5], "less": [0.1, 0.1, 0.1]}


@pytest.fixture
def peaks(monkeypatch):
    monkeypatch.setattr(comparison, "matmul_peak", lambda dtype: {torch.bfloat16: 40e9}[dtype])
    monkeypatch.setattr(comparison, "copy_peak", lambda: 10e9)


def test_summary(peaks):
    result = comparison.summary(
        TIMES,
        promised=2,
        memory={"ours": 2**20, "slow": 3 * 2**20},
        flops=8e9,
        dtype=torch.bfloat16,
        moved=4e9,
        missing={"absent": "not installed"},
        less_work=["less"],
    )
    ours, slow, fast, _ = result["candidates"].values()
    assert list(result["candidates"]) == ["ours", "slow", "fast", "less"]
    assert (ours["median_ms"], ours["best_ms"], ours["median_ratio"], ours["best_ratio"]) == (2e3, 1e3, 1, 1)
    assert (slow["median_ratio"], slow["best_ratio"], fast["best_ratio"]) == (2, 2, 0.5)
    assert (ours["spread"], slow["spread"]) == (0.5, 0.5)  # quartiles 1.5 and 2.5 of 2, 3 and 5 of 4
    assert (slow["promised_ratio"], fast["promised_ratio"], ours["promised_ratio"]) == (2, None, None)
    assert (ours["peak_mib"], slow["peak_mib"], fast["peak_mib"]) == (1, 3, None)
    assert (ours["gflop_per_s"], ours["matmul_fraction"]) == (4, 0.1)
    assert (ours["gb_per_s"], ours["copy_fraction"]) == (2, 0.2)
    assert (result["best_peer"], result["best_peer_ratio"]) == ("fast", 1.5)  # by the median, without "less"
    assert result["missing"] == {"absent": "not installed"}


def test_summary_of_ours_alone():
    result = comparison.summary({"ours": [1.0]})
    assert (result["best_peer"], result["candidates"]["ours"]["spread"]) == (None, None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"memory": {"other": 1}}, r"memory must name what is timed \(ours, slow, fast, less\), got \['other'\]"),
        ({"less_work": ["other"]}, r"less_work must name what is timed .*, got \['other'\]"),
        ({"missing": {"slow": "why"}}, r"missing must name what is not timed, got \['slow'\]"),
    ],
)
def test_unknown_peers(wrong, message):
    with pytest.raises(ValueError, match=message):
        comparison.summary(TIMES, **wrong)


def test_interleaved_takes_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in ("a", "b")}

    def clock(function):
        function()
        return float(len(calls))

    assert comparison.interleaved(runs, 2, clock) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert calls == ["a", "b", "a", "b"]


def test_growth_fits_powers_and_leaves_out_what_could_not_run():
    sizes = [2, 4, 8]
    cases, times = {}, {}
    for size in sizes:
        runs = size <= 4
        cases[size] = Case({}, {"ours": size**1, "dense": size**3}, {} if runs else {"dense": "memory"}, size**2, size)
        times[size] = {"ours": [1.0, size**1.5, 1e9]} | ({"dense": [size**2.0]} if runs else {})
    result = comparison.growth("length", cases, times, {})
    sweep = result["sweep"]
    ours, dense, ideal = sweep["candidates"]["ours"], sweep["candidates"]["dense"], sweep["ideal"]
    assert ours["time_exponent"] == pytest.approx(1.5)
    assert ours["memory_exponent"] == pytest.approx(1)
    assert dense["time_exponent"] == pytest.approx(2)
    assert dense["median_ms"] == [4e3, 16e3, None]
    assert dense["peak_mib"][2] is None
    assert (ideal["time_exponent"], ideal["memory_exponent"]) == (pytest.approx(2), pytest.approx(1))
    assert result["missing"] == {"dense": "at length = 8: memory"}


TASKS = {
    "forward+backward": (attention.forward_and_backward, 3, 12),
    "sampling step": (attention.forward, 1, 12),
    "decoding": (attention.forward, 1, 1),
    "two thoughts": (attention.forward_and_backward, 2, 24),
}


def checker(name):
    run, queries, anchors = TASKS[name]
    task = attention.Task(run, SHAPE, queries, anchors, rounds=1)
    inputs = attention.random_inputs(task)
    return attention.assert_right(task, inputs), inputs


@pytest.mark.parametrize("name", TASKS)
def test_thought_attention_gate_passes_what_is_right(name):
    check, _ = checker(name)
    check("torch")
    check(attention.DENSE)


def neighbour(*inputs, anchors, **options):
    length, count = inputs[1].shape[2], inputs[0].shape[2]
    anchors = torch.arange(count) if anchors is None else anchors
    return attention.thought_attention(*inputs, anchors=(anchors + 1).clamp_max(length - 1), **options)


def inexact(*inputs, **options):
    return attention.thought_attention(*inputs, **options) * (1 + 1e-5)


def no_gradient_of_thoughts(query, key, value, thought_key, thought_value, **options):
    detached = thought_key.detach() + 0 * thought_key
    return attention.thought_attention(query, key, value, detached, thought_value, **options)


@pytest.mark.parametrize("wrong", [neighbour, inexact, no_gradient_of_thoughts])
def test_thought_attention_gate_fails_what_is_wrong(wrong, monkeypatch):
    check, _ = checker("forward+backward")
    monkeypatch.setattr(attention, "op", lambda backend, anchors, inputs: wrong(*inputs, anchors=anchors))
    with pytest.raises(AssertionError, match="exceeds"):
        check("torch")


@pytest.mark.parametrize("name", TASKS)
def test_both_orders_are_the_same_tree(name):
    _, inputs = checker(name)
    length, anchors, queries, steps = attention.sizes(inputs)

    def by_anchor(steps):
        return torch.arange(anchors * steps).view(steps, anchors).t().flatten()

    masks = []
    for by_step in (False, True):
        query, key = (torch.arange(size) for size in (anchors * queries, length + anchors * steps))
        if by_step:
            query = query[by_anchor(queries)]
            key = torch.cat([key[:length], key[length:][by_anchor(steps)]])
        masks.append(attention.tree(length, anchors, queries, steps, by_step)(None, None, query[:, None], key))
    assert torch.equal(*masks)


@pytest.mark.parametrize("name", ["torch", attention.DENSE])
def test_the_backward_is_timed_without_its_forward(name, monkeypatch):
    task = attention.Task(attention.forward_and_backward, SHAPE, 3, 12, rounds=1, backward_only=True)
    inputs = attention.random_inputs(task)
    gradient = torch.randn_like(inputs.query)
    _, *expected = task.run(attention.candidate(name, inputs), inputs, gradient)
    run = attention.prepared(task, name, inputs, gradient)
    monkeypatch.setattr(attention, "op", None)
    for _ in range(2):
        for actual, wanted in zip(run(), expected, strict=True):
            torch.testing.assert_close(actual, wanted)


def test_linear_cross_entropy_gate():
    inputs, target = head.random_inputs("linear", HeadShape(40, 16, 50, torch.float32))
    check = head.Check(inputs, target)
    check.ours(head.candidate("torch"))

    def wrong(inputs, target):
        return head.candidate("torch")(inputs, target) * (1 + 1e-5)

    with pytest.raises(AssertionError, match="exceeds"):
        check.ours(wrong)


@pytest.mark.parametrize("op", mixing.BYTES_PER_LOGIT)
def test_mixing_gate(op, monkeypatch):
    inputs = mixing.random_inputs(LogitsShape(40, 50, torch.float32))
    check = mixing.assert_right(op, inputs, mixing.random_gradient(op, inputs))
    check("torch")
    right, plain = mixing.ours, mixing.candidate(op, mixing.PLAIN)
    monkeypatch.setattr(mixing, "ours", lambda *arguments: right(*arguments) * (1 + 1e-5))
    with pytest.raises(AssertionError, match="exceeds"):
        check("torch")
    check(mixing.PLAIN)
    monkeypatch.setattr(mixing, "candidate", lambda op, name: lambda *arguments: plain(*arguments) * 1.1)
    with pytest.raises(AssertionError, match=r"result is off by 1\.0e-01 of its norm"):
        check("a peer")


def test_linear_sample_gate(monkeypatch):
    inputs = sampling.random_inputs(HeadShape(40, 16, 50, torch.float32))
    sampling.assert_right("torch", *inputs)
    right = sampling.candidate
    monkeypatch.setattr(
        sampling, "candidate", lambda name: right("reference" if name == "reference" else "plain PyTorch")
    )
    with pytest.raises(AssertionError):
        sampling.assert_right("torch", *inputs)


BENCHMARKS = """
import time
from dataclasses import dataclass

import pytest
from comparison import Case


@dataclass
class Shape:
    rows: int
    length: int


def wait(milliseconds):
    return lambda: time.sleep(milliseconds / 1e3)


def bench_compared(compare):
    peers = {"slow": wait(20), "part": wait(1)}
    compare(wait(10), peers, rounds=3, missing={"absent": "ImportError: no absent"}, shape=Shape(5, 6),
            less_work=["part"], memory={"ours": 2**20})


def bench_grows(sweep):
    def case(size):
        runs = {"ours": wait(10 * size), "dense": wait(10 * size**2)}
        return Case(runs, {"ours": size, "dense": size**2}, missing={}, work=size, results=1)

    sweep("length", [1, 2, 4], case, rounds=3, shape=Shape(5, 0))


@pytest.mark.gpu
def bench_gpu_only(compare):
    compare(wait(1), {}, rounds=1)


def bench_wrong(compare):
    assert False
"""


@pytest.fixture(scope="session")
def run_of_benchmarks(tmp_path_factory):
    """A run of the benchmarks above: the process and its JSON."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "conftest.py").write_text((ROOT / "benchmarks" / "conftest.py").read_text())
    (folder / "bench_some.py").write_text(BENCHMARKS)
    (folder / "pytest.ini").write_text(
        "[pytest]\nmarkers = gpu\npython_files = bench_*.py\npython_functions = bench_*\n"
    )
    # As if started by hand: nothing is timed where pytest-xdist is at work.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks", ROOT / "tests", os.environ.get("PYTHONPATH", ""))))
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "--benchmark-only", "--benchmark-json=results.json"],
        cwd=folder,
        env=environment | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    return process, folder / "results.json"


def test_what_a_run_writes(run_of_benchmarks):
    process, path = run_of_benchmarks
    results = json.loads(path.read_text())
    assert process.returncode == 1  # one of them is wrong
    assert results["format"] == FORMAT
    assert results["command"] == "pytest --benchmark-only --benchmark-json=results.json"
    assert results["not_run"] == {"gpu_only": "needs a CUDA device", "wrong": "FAILED"}
    assert os.uname().nodename not in json.dumps(results)

    compared, grows = (each["extra_info"] for each in results["benchmarks"])
    candidates = compared["candidates"]
    assert candidates["slow"]["median_ratio"] > 1  # no more can be said of sleeping on a busy machine
    assert candidates["ours"]["median_ms"] == pytest.approx(results["benchmarks"][0]["stats"]["median"] * 1e3)
    assert (compared["best_peer"], compared["shape"]) == ("slow", {"rows": "5", "length": "6"})
    assert grows["shape"] == {"rows": "5"}
    ours, dense = grows["sweep"]["candidates"].values()
    assert ours["time_exponent"] < dense["time_exponent"]
    assert dense["memory_exponent"] == pytest.approx(2)


def test_what_a_run_prints(run_of_benchmarks):
    process, _ = run_of_benchmarks
    for line in (
        "missing peer of compared: absent (ImportError: no absent)",
        "not run: gpu_only (needs a CUDA device)",
        "best peer of compared: slow, ",
        "grows: dense time ~ size^",
    ):
        assert line in process.stdout, process.stdout


def test_whole_programs_run_before_the_ops_that_keep_memory():
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = [line.partition("::")[0] for line in process.stdout.splitlines() if "::" in line]
    programs = {f"benchmarks/bench_{name}.py" for name in ("anchors", "generation", "training_step")}
    first_op = next(i for i, file in enumerate(files) if file not in programs)
    assert set(files[:first_op]) == programs
    assert programs.isdisjoint(files[first_op:])
