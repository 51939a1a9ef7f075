"""On a GPU that is not there (``pretended_gpu``): which backend is taken, what is refused, and that waiting is seen."""

import re

import pytest
import torch
from pretended_gpu import DEVICE
from test_capability import machine  # noqa: F401
from thought_attention_cases import make_inputs
from waiting import NothingWaits

from quietstar.ops import (
    _native,
    _registration,
    linear_cross_entropy,
    linear_sample,
    mix_logits,
    mixed_cross_entropy,
    mixed_linear_cross_entropy,
    thought_attention,
)

ROWS, SIZE, VOCABULARY = 6, 8, 40
BF16 = torch.bfloat16


class Arguments:
    """Of every op, on the pretended GPU."""

    def __init__(self, dtype=BF16, head=8):
        def tensor(*shape):
            return torch.empty(shape, dtype=dtype, device=DEVICE)

        self.attention = [x.detach() for x in make_inputs(head=head, dtype=dtype, device=DEVICE)]
        self.logits = tensor(ROWS, VOCABULARY), tensor(ROWS, VOCABULARY), tensor(ROWS)
        self.hidden, self.weight = tensor(ROWS, SIZE), tensor(VOCABULARY, SIZE)
        self.target = torch.empty(ROWS, dtype=torch.int64, device=DEVICE)
        self.mixed = self.hidden, self.hidden, tensor(ROWS), self.weight, self.target


CALLS = {
    "thought_attention": lambda x, **options: thought_attention(*x.attention, **options),
    "mix_logits": lambda x, **options: mix_logits(*x.logits, **options),
    "mixed_cross_entropy": lambda x, **options: mixed_cross_entropy(*x.logits, x.target, **options),
    "linear_cross_entropy": lambda x, **options: linear_cross_entropy(x.hidden, x.weight, x.target, **options),
    "mixed_linear_cross_entropy": lambda x, **options: mixed_linear_cross_entropy(*x.mixed, **options),
    "linear_sample": lambda x, **options: linear_sample(x.hidden, x.weight, seed=3, **options),
}
every_call = pytest.mark.parametrize("op", CALLS)


@pytest.fixture
def taken(monkeypatch):
    """The backends that registered ops were called with."""
    names = []
    monkeypatch.setattr("pretended_gpu.on_call", lambda function, arguments: names.append(arguments[-1]))
    return names


@every_call
@pytest.mark.parametrize(
    ("gpu", "dtype", "backend"),
    [
        ("T4", BF16, "torch"),
        ("A100", BF16, "triton"),
        ("L40S", BF16, "triton"),
        ("H100", torch.float32, "triton"),
        ("B200", torch.float16, "triton"),
        ("H100", torch.float64, "torch"),
    ],
    indirect=["gpu"],
)
def test_the_backend_that_is_taken(op, gpu, dtype, backend, taken):
    pytest.importorskip("triton")
    CALLS[op](Arguments(dtype))
    assert taken == [backend]


@every_call
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("gpu", ["T4"], indirect=True)
def test_an_older_gpu_is_refused(op, backend, gpu, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(_native, "_C", object())
    monkeypatch.setattr(_native, "_ARCHITECTURES", ("75-virtual",))
    message = f"backend: '{backend}' cannot run {op} here: needs compute capability 8.0 or newer, got 7.5 on cuda:0; "
    with pytest.raises(ValueError, match=re.escape(message + "usable here: torch, reference")):
        CALLS[op](Arguments(), backend=backend)


@every_call
def test_kernels_of_the_cpu_are_refused(op, gpu, monkeypatch):
    monkeypatch.setattr(_native, "_C", object())
    with pytest.raises(ValueError, match="'cpu' cannot run .*: its kernels need tensors on the CPU, got cuda; usable"):
        CALLS[op](Arguments(), backend="cpu")
