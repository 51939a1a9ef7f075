"""One line says of each promise, and of each peer, what became of it."""

import json

import promises
import pytest
from benchmark_results import results

FORWARD = "thought_attention[triton-forward, L = 2048]"
HEAD = "cross_entropy[triton-mixed_linear-2048]"


@pytest.mark.parametrize(
    ("name", "found", "text"),
    [
        (FORWARD, {"tflops": 534.4}, "forward, L = 2048, bf16: 534 TFLOP/s, promised 520: holds"),
        (FORWARD, {"tflops": 519.9}, "forward, L = 2048, bf16: 520 TFLOP/s, promised 520: does NOT hold"),
        (HEAD, {"ms": 2.3}, "mixed head, 2048 x 4096 x 32000, bf16: 2.30 ms, promised 2.3: holds"),
        (HEAD, {"ms": 2.31}, "mixed head, 2048 x 4096 x 32000, bf16: 2.31 ms, promised 2.3: does NOT hold"),
        (
            FORWARD,
            {"tflops": 600, "peers": {"FlashAttention-3 + merge": 1.21}},
            "forward, L = 2048, bf16: 1.21x FlashAttention-3 + merge, promised 1.3: does NOT hold",
        ),
        (
            FORWARD,
            {"tflops": 600, "peers": {"dense-mask SDPA": 1.0}},
            "forward, L = 2048, bf16: 1.00x dense-mask SDPA, promised 1: holds",
        ),
        (
            FORWARD,
            {"tflops": 600, "missing": {"FlashAttention-3 + merge": "ModuleNotFoundError: no module"}},
            "forward, L = 2048, bf16: not compared with FlashAttention-3 + merge: ModuleNotFoundError: no module",
        ),
        ("mixing[triton-x]", {"peers": {"plain": 0.99}}, "mixing[triton-x]: 0.99x plain, promised 1: does NOT hold"),
    ],
)
def test_what_became_of_a_promise(name, found, text):
    assert text in promises.lines(results(**{name: found}))


@pytest.mark.parametrize(
    ("device", "name", "found", "end"),
    [
        ("NVIDIA H100 80GB HBM3", FORWARD, {"tflops": 530}, "530 TFLOP/s, promised 520: holds"),
        (
            "NVIDIA H100 80GB HBM3",
            HEAD,
            {"ms": 2.4},
            "2.40 ms, promised 2.3: promised on H200 only, this is NVIDIA H100 80GB HBM3",
        ),
        (
            "NVIDIA A100-SXM4-80GB",
            FORWARD,
            {"tflops": 200},
            "200 TFLOP/s, promised 520: promised on H200 and H100 80GB HBM3 only, this is NVIDIA A100-SXM4-80GB",
        ),
    ],
)
def test_amounts_are_of_devices(device, name, found, end):
    said = next(line for line in promises.lines(results(device, **{name: found})) if "promised" in line)
    assert said.endswith(end)


def test_what_was_not_measured_is_said():
    said = list(promises.lines(results(not_run={HEAD: "FAILED"}), ["mixing[triton-x]"]))
    assert "mixed head, 2048 x 4096 x 32000, bf16: not measured: FAILED" in said
    assert "forward, L = 2048, bf16: not measured: it was not begun" in said
    assert "mixing[triton-x]: not measured: it was not begun" in said


def test_the_command(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results(**{FORWARD: {"tflops": 534}})))
    assert promises.main([str(path)]) == 0
    assert "534 TFLOP/s, promised 520: holds" in capsys.readouterr().out
    path.write_text("{}")
    assert promises.main([str(path)]) == 1
    assert "results of format" in capsys.readouterr().err
