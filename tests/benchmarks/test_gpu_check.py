"""``make gpu-check`` without a GPU: parts run one by one, with limits and verdicts, and its training sweep works."""

import json
import sys

import gpu_check
import pytest
import torch
import training_7b
from gpu_check import Step


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """Run the command with these parts as if there were a GPU: exit code and report."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "machine", lambda: {"device": "a GPU"})

    def run(**parts):
        monkeypatch.setattr(gpu_check, "PARTS", {name: lambda _, steps=steps: steps for name, steps in parts.items()})
        exit_code = gpu_check.main(["--output_dir", str(tmp_path)])
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


def test_a_failing_part_does_not_stop_the_others(on_a_gpu, capsys, tmp_path):
    result = tmp_path / "result.json"
    exit_code, report, log = on_a_gpu(
        build=[Step(python("print('broken'); raise SystemExit(3)"), 60)],
        tests=[Step(python("import time; print('begun', flush=True); time.sleep(60)"), 1)],
        sanitizer=[Step(["no-such-program"], 60)],
        training=[Step(python(f"open({str(result)!r}, 'w').write('[5]')"), 60, result)],
    )
    assert exit_code == 1
    (build,), (tests,), (sanitizer,), (training,) = report["parts"].values()
    assert build["exit_code"] == 3
    assert tests["exit_code"] is None
    assert "no-such-program is not on PATH" in sanitizer["not_run"]
    assert training["exit_code"] == 0
    assert training["result"] == [5]
    assert "broken" in log
    assert "begun" in log
    printed = capsys.readouterr().out
    for verdict in (
        "build       FAILED in",
        "tests       FAILED: killed after 1 s",
        "not run: no-such",
        "training    ok",
    ):
        assert verdict in printed


def test_what_cannot_run_is_no_failure(on_a_gpu):
    assert on_a_gpu(sanitizer=[Step(["no-such-program"], 60)], build=[Step(python("pass"), 60)])[0] == 0


def test_every_part_names_programs_that_exist_in_the_repository(tmp_path):
    for part in gpu_check.PARTS.values():
        for step in part(tmp_path):
            for argument in step.command[1:]:
                if argument.endswith(".py"):
                    assert (gpu_check.ROOT / argument).exists(), argument


def test_training_sweep(tmp_path):
    """Both programs train at every batch size, and the sweep ends where it is told to."""
    file = tmp_path / "training.json"
    training_7b.main(["--shape", "tiny", "--length", "16", "--most", "2", "--json", str(file)])
    result = json.loads(file.read_text())
    for name in ("ours", "sequential baseline"):
        assert [row["batch"] for row in result[name]] == [1, 2]
        assert all(row["tokens_per_s"] > 0 for row in result[name])
        assert all(0 < row["model_flop_utilisation"] < 1 for row in result[name])


def test_training_sweep_ends_where_memory_ends():
    model = training_7b.random_model("tiny")

    def loss_of(model, text):
        raise torch.OutOfMemoryError("no memory")

    optimizer = torch.optim.SGD(model.parameters())
    assert training_7b.sweep(model, optimizer, loss_of, length=8, most=64) == []
