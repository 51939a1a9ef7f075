"""``make gpu-check`` without a GPU: parts run one by one, with limits and verdicts, and its training sweep works."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import torch
import training_7b
from benchmark_results import results
from gpu_check import Part, Step
from time_limit import OUT_OF_TIME

from quietstar.ops import tune


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """Run the command with these parts as if there were a GPU: exit code and report."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "machine", lambda: {"device": "a GPU"})

    def run(minutes=1.0, **parts):
        table = {name: Part(1, lambda *_, steps=steps: steps) for name, steps in parts.items()}
        monkeypatch.setattr(gpu_check, "PARTS", table)
        exit_code = gpu_check.main(["--output_dir", str(tmp_path), "--minutes", str(minutes), "--parts", *parts])
        return (
            exit_code,
            json.loads((tmp_path / "gpu-check.json").read_text()),
            (tmp_path / "gpu-check.log").read_text(),
        )

    return run


def test_without_a_gpu_nothing_runs_and_nothing_fails(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main(["--output_dir", str(tmp_path)]) == 0
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "all"], "argument --parts: invalid choice: 'all'"),
        (["--minutes", "0"], "--minutes must be above 0, got 0.0"),
        (["--output_dir", "/dev/null/there"], "--output_dir /dev/null/there: Not a directory"),
    ],
)
def test_bad_arguments(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(SystemExit, match=r"^2$"):
        gpu_check.main(arguments)
    assert message in capsys.readouterr().err


def test_a_failing_part_does_not_stop_the_others(on_a_gpu, capsys, tmp_path):
    result = tmp_path / "result.json"
    exit_code, report, log = on_a_gpu(
        build=[Step(python("print('broken'); raise SystemExit(3)"))],
        tests=[Step(python(f"print('came far'); raise SystemExit({OUT_OF_TIME})")), Step(python("print('second')"))],
        sanitizer=[Step(["no-such-program"])],
        training=[Step(python(f"open({str(result)!r}, 'w').write('[5]')"), result)],
    )
    assert exit_code == 1
    (build,), tests, (sanitizer,), (training,) = report["parts"].values()
    assert build["exit_code"] == 3
    assert [step["exit_code"] for step in tests] == [OUT_OF_TIME, 0]
    assert "no-such-program is not on PATH" in sanitizer["not_run"]
    assert (training["exit_code"], training["result"]) == (0, [5])
    assert log.index("broken") < log.index("came far") < log.index("second")
    printed = capsys.readouterr().out
    for line in ("build       FAILED in", "tests       ok as far as it", "not run: no-such", "training    ok in"):
        assert line in printed


def test_a_part_that_takes_too_long_keeps_what_it_has(on_a_gpu, tmp_path):
    """It is interrupted, and then killed with what it has started; a result of an earlier run is not taken for its."""
    result, kept, child = (tmp_path / name for name in ("old.json", "kept.json", "child"))
    result.write_text("[1]")
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(child)!r}, 'w').write(str(child.pid)); print('begun', flush=True); time.sleep(60)"
    )
    polite = f"""
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    open({str(kept)!r}, "w").write("[2]")
"""
    begin = time.monotonic()
    exit_code, report, log = on_a_gpu(
        minutes=0.2, tests=[Step(python(stubborn), result), Step(python(polite), kept)], build=[Step(python("pass"))]
    )
    assert time.monotonic() - begin < 40
    assert exit_code == 1
    first, second = report["parts"]["tests"]
    assert (first["exit_code"], second["exit_code"], second["result"]) == (None, None, [2])
    assert "result" not in first
    assert "begun" in log
    assert "FAILED: interrupted after" in log
    status = Path("/proc", child.read_text(), "status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_what_cannot_run_is_no_failure(on_a_gpu):
    assert on_a_gpu(sanitizer=[Step(["no-such-program"])], build=[Step(python("pass"))])[0] == 0


def test_every_part_names_programs_that_exist_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check, "machine", lambda: {"device": "NVIDIA H200 (SXM)"})
    for part in gpu_check.PARTS.values():
        for step in part.steps(tmp_path, 10.0):
            for argument in step.command[1:]:
                if argument.endswith(".py"):
                    assert (gpu_check.ROOT / argument).exists(), argument
    [build] = gpu_check.build(tmp_path, 10.0)
    assert "cmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real" in build.command
    [tuning] = gpu_check.tuning(tmp_path, 90.0)
    assert tuning.command[-2:] == ["--output", str(gpu_check.ROOT / "benchmarks/results/tuned-nvidia-h200-sxm.txt")]
    assert tune.parser().parse_args(tuning.command[tuning.command.index("quietstar.ops.tune") + 1 :]).minutes == 1.5


def test_promises_come_last(on_a_gpu, capsys, tmp_path):
    found, path = results(**{"mixing[x]": {"peers": {"plain": 50.0}}}), tmp_path / "benchmarks.json"
    written = f"open({str(path)!r}, 'w').write({json.dumps(found)!r})"
    on_a_gpu(benchmarks=[Step(python(written), path)], training=[Step(python("pass"))])
    printed = capsys.readouterr().out.splitlines()
    kept = json.loads((tmp_path / "gpu-check.json").read_text())["promises"]
    assert kept == gpu_check.promises({"result": found})
    assert printed[2:-1] == kept
    assert "mixing[x]: 50.00x plain, promised 1: holds" in kept
    assert "thought_attention[triton-decoding]: not measured: it was not begun" in kept


@pytest.mark.parametrize(
    ("step", "line"),
    [
        ({}, "promises: nothing was measured"),
        ({"result": "benchmarks.json is not JSON: x"}, "promises: benchmarks.json: results of format"),
    ],
)
def test_without_results_there_is_nothing_to_say(step, line):
    [said] = gpu_check.promises(step)
    assert said.startswith(line)


@pytest.mark.slow
def test_key_benchmarks_exist(tmp_path):
    """Their names hold sizes: those of a GPU."""
    [step] = gpu_check.benchmarks(tmp_path, 10.0)
    collect = "import torch; torch.cuda.is_available = lambda: True; import pytest; raise SystemExit(pytest.main())"
    options = [*step.command[step.command.index("pytest") + 1 :], "--collect-only"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    collected = subprocess.run(
        [sys.executable, "-c", collect, *options],
        cwd=gpu_check.ROOT,
        env=outside | {"PYTHONPATH": os.pathsep.join(map(str, (gpu_check.ROOT, gpu_check.ROOT / "benchmarks")))},
        capture_output=True,
        text=True,
    )
    assert collected.returncode == 0, collected.stdout + collected.stderr
    assert f"{len(gpu_check.KEY_BENCHMARKS)} tests collected" in collected.stdout


def test_time_limit(tmp_path):
    """Nothing is begun after it, what is left out is named, and only a failure is one."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_a():\n    time.sleep(2)\ndef test_b():\n    pass\ndef test_c():\n    assert False\n"
    )

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "-p", "time_limit", *arguments]
        environment = os.environ | {"PYTHONPATH": str(gpu_check.ROOT / "benchmarks")}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    limited = run("--seconds=1")
    assert limited.returncode == OUT_OF_TIME
    assert "1 passed, 2 skipped" in limited.stdout
    assert "not begun, 1 s were over: test_slow.py::test_b" in limited.stdout
    assert run("--seconds=60").returncode == 1
    assert run("-k", "not c").returncode == 0


def test_training_sweep(tmp_path):
    """Both programs train at every batch size, and the sweep ends where it is told to."""
    file = tmp_path / "training.json"
    training_7b.main(["--shape", "tiny", "--length", "16", "--most", "2", "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["ended"] == dict.fromkeys(("ours", "sequential baseline"), "batch 4 was not asked for")
    for name in result["ended"]:
        assert [row["batch"] for row in result[name]] == [1, 2]
        assert all(row["tokens_per_s"] > 0 for row in result[name])
        assert all(0 < row["model_flop_utilisation"] < 1 for row in result[name])


def test_training_sweep_ends_where_memory_or_time_ends(monkeypatch):
    def measured(model, optimizer, loss_of, batch, length):
        return {"batch": batch, "seconds_per_step": 5 * batch, "timed_steps": 1} if batch < 8 else None

    def sweep(seconds):
        rows = []
        ended = training_7b.sweep(None, None, None, 8, 64, time.monotonic() + seconds, rows.append)
        return [row["batch"] for row in rows], ended

    monkeypatch.setattr(training_7b, "measured", measured)
    assert sweep(1000) == ([1, 2, 4], "no memory for batch 8")
    assert sweep(30) == ([1, 2], "no time for batch 4")
    assert sweep(-1) == ([], "no time for batch 1")


def test_memory_that_does_not_suffice_is_no_row():
    model = training_7b.random_model("tiny")

    def loss_of(model, text):
        raise torch.OutOfMemoryError("no memory")

    assert training_7b.measured(model, torch.optim.SGD(model.parameters()), loss_of, 1, 8) is None


def test_the_large_shape_without_a_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(training_7b, "DEVICE", "cpu")
    training_7b.main([])
    assert "no CUDA device here for the shape 7b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "70b"], "argument --shape: invalid choice: '70b'"),
        (["--length", "5"], "--length must be at least 6, got 5"),
        (["--most", "0"], "--most must be at least 1, got 0"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json: /nowhere is no folder"),
    ],
)
def test_bad_arguments_of_the_training(arguments, message, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        training_7b.main(arguments)
    assert message in capsys.readouterr().err
