"""Away from the CPU thought attention neither reads a value nor copies from the host, so CUDA graphs can capture it.

On the meta device tensors have shapes but no values: whatever needs one fails. Triton's kernels are not launched.
"""

import pytest
import torch
from thought_attention_cases import CASES, case
from waiting import NothingFromTheHost, launch_nothing

from quietstar.ops import thought_attention
from quietstar.ops.thought_attention import autograd, flash, library


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """Its own code instead of the ops' shape functions, which is what meta tensors are for otherwise."""
    if request.param == "triton":
        launch_nothing(monkeypatch)
    monkeypatch.setattr(autograd, "_forward_op", autograd._forward)
    monkeypatch.setattr(autograd, "_backward_op", autograd._backward)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no meta device
    with NothingFromTheHost(), torch.device("meta"):
        yield request.param


@pytest.mark.parametrize("through_lse", [False, True], ids=["output", "output and lse"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_read(name, through_lse, backend):
    inputs, options = case(name, torch.float16, "meta")
    output, lse = thought_attention(*inputs, **options, return_lse=True, backend=backend)
    loss = output.sum() + lse.sum() if through_lse else output.sum()
    assert [x.shape for x in torch.autograd.grad(loss, inputs)] == [x.shape for x in inputs]


@pytest.mark.parametrize(
    ("name", "repeats"), [("all positions", 1), ("repeated anchors", None), ("left padding", None), ("window", None)]
)
def test_the_library_takes_what_it_can_without_looking(name, repeats, monkeypatch):
    monkeypatch.setattr(flash, "supports", lambda query, scale: True)
    inputs, options = case(name, device="meta")
    mask = (options.get(name) for name in ("anchors", "key_start", "window"))
    assert library.causal_repeats(*mask, 1.0, *inputs[:2]) == repeats
