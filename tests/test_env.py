import platform
import sys

import pytest
import torch

import quietstar
from quietstar import env, ops
from quietstar.env import OPS, environment, main


def test_report_is_printed_line_by_line(capsys):
    report = environment()
    assert main([]) == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed == report
    assert report["quietstar"].startswith(f"{quietstar.__version__} in ")
    assert report["python"].startswith(platform.python_version())
    assert report["torch"] == torch.__version__
    assert f"{torch.get_num_threads()} threads" in report["cpu"]


@pytest.mark.parametrize("op", OPS)
def test_backends_of_every_op_are_found(op):
    assert "cpu: reference, torch" in environment()[op]


def test_only_known_ops_are_reported():
    assert set(OPS) == set(ops.__all__)


def test_compiled_module_reports_its_build():
    _C = pytest.importorskip("quietstar._C", reason="a checkout that is not installed has no compiled module")
    built = _C.build_info()
    assert list(built) == ["compiler", "cxx_standard", "openmp", "cuda", "cuda_architectures"]
    assert built["cxx_standard"] == "C++17"
    assert (built["cuda"] is None) == (built["cuda_architectures"] is None)
    assert built["compiler"] in environment()["quietstar._C"]


def test_unavailable_backend_is_not_listed(monkeypatch):
    """A backend that an op refuses is left out; one that breaks is shown with its error."""

    def mix_logits(*arguments, backend):
        if backend == "cuda":
            raise RuntimeError("no kernel image\nis available")
        if backend != "reference":
            raise ValueError("backend: not here")

    monkeypatch.setattr(ops, "mix_logits", mix_logits)
    assert environment()["mix_logits"] == "cpu: reference, cuda fails (RuntimeError: no kernel image is available)"


@pytest.mark.parametrize(
    ("missing", "label", "answer"),
    [
        ("torch", "cpu", "unknown (ModuleNotFoundError: "),
        ("quietstar.ops", "mix_logits", "unknown (ModuleNotFoundError: "),
        ("quietstar._C", "quietstar._C", "not available ("),
    ],
)
def test_a_missing_module_does_not_stop_the_report(monkeypatch, missing, label, answer):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delattr(quietstar, missing.removeprefix("quietstar."), raising=False)
    report = environment()
    assert report[label].startswith(answer)
    assert report["python"].startswith(platform.python_version())


def test_a_broken_cuda_does_not_stop_the_report(monkeypatch):
    def broken():
        raise RuntimeError("driver\nmismatch")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    report = environment()
    assert report["cuda"] == "unknown (RuntimeError: driver mismatch)"
    assert report["torch"] == torch.__version__


def test_devices_are_listed(monkeypatch):
    """Stands in for a machine with a GPU."""

    class Properties:
        name, major, minor, total_memory = "NVIDIA H200", 9, 0, 141 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    device = "NVIDIA H200, sm_90, 141 GiB"
    assert environment()["cuda"] == f"CUDA 13.0: {device}; {device}"


def test_backends_are_found_on_every_device(monkeypatch):
    """Stands in for a machine with GPUs of two kinds."""
    usable = {"cpu": ["reference", "cpu"], "cuda:0": ["triton", "cuda"], "cuda:1": ["torch"], "cuda:2": ["torch"]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(env, "_usable", lambda op, device: usable[device])
    assert environment()["mix_logits"] == "cpu: reference, cpu; cuda:0: triton, cuda; cuda:1, cuda:2: torch"


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (None, "Gluon for Hopper"),
        ("needs Triton >= 3.8, found 3.6.0", "Triton (Gluon for Hopper needs Triton >= 3.8, found 3.6.0)"),
    ],
)
def test_the_kernel_that_attention_takes_is_named(reason, said, monkeypatch):
    """Stands in for a machine with two GPUs."""
    pytest.importorskip("triton")
    from quietstar.ops import _availability
    from quietstar.ops.thought_attention import gluon_launch

    monkeypatch.setattr(env, "_gpus", lambda: ["cpu", "cpu"])
    monkeypatch.setattr(_availability, "triton_unavailable", lambda tensor: None)
    monkeypatch.setattr(gluon_launch, "unavailable", lambda inputs, mask: reason)
    assert environment()["thought_attention.forward"] == f"cpu, cpu: {said}"


def test_the_kernel_that_attention_cannot_take_is_not_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert environment()["thought_attention.forward"] == "no GPU"
    monkeypatch.setattr(env, "_gpus", lambda: ["cpu"])
    assert environment()["thought_attention.forward"].startswith("cpu: none of Triton's (")
