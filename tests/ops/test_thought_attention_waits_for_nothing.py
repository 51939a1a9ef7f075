"""On a GPU thought attention neither reads a value nor copies from the host, so CUDA graphs can capture it.

The GPU is a pretended one (``pretended_gpu``), and no kernel is launched.
"""

import pytest
import torch
from pretended_gpu import DEVICE, nothing_waits
from thought_attention_cases import CASES, case

from quietstar.ops import thought_attention
from quietstar.ops.thought_attention import backend_torch, flash
from quietstar.ops.thought_attention.inputs import Inputs, Mask


@pytest.mark.parametrize(
    ("name", "dtype", "through_lse"),
    [(name, torch.bfloat16, False) for name in CASES] + [(name, torch.float32, True) for name in list(CASES)[::4]],
    ids=str,
)
def test_nothing_is_read(name, through_lse, dtype, gpu_backend):
    inputs, options = case(name, dtype, DEVICE)
    differentiable = gpu_backend != "cuda"
    with nothing_waits(), torch.set_grad_enabled(differentiable):
        output, lse = thought_attention(*inputs, **options, return_lse=True, backend=gpu_backend)
        assert (output.shape, output.dtype, output.device) == (Inputs(*inputs).output_shape, dtype, DEVICE)
        assert (lse.shape, lse.dtype, lse.device) == (output.shape[:-1], torch.float32, DEVICE)
        if differentiable:
            loss = output.sum() + lse.sum() if through_lse else output.sum()
            gradients = torch.autograd.grad(loss, inputs)
            assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, dtype) for x in inputs]


@pytest.mark.parametrize(
    ("name", "repeats"), [("all positions", 1), ("repeated anchors", None), ("left padding", None), ("window", None)]
)
def test_the_library_takes_what_it_can_without_looking(name, repeats, gpu):
    inputs, options = case(name, torch.float16, DEVICE)
    inputs = Inputs(*inputs)
    assert flash.supports(inputs.query, 1.0)
    assert backend_torch.causal_repeats(inputs, Mask.of(inputs, **options)) == repeats


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_read_for_the_kernel_in_gluon(name, gpu, monkeypatch):
    """With more rows and other heads than the cases have, or it would not be taken."""
    gluon_launch = pytest.importorskip("quietstar.ops.thought_attention.gluon_launch")
    if gluon_launch._triton_too_old():
        pytest.skip(gluon_launch._triton_too_old())
    shapes, options = CASES[name]
    inputs, options = case(name, torch.bfloat16, DEVICE, {name: (shapes | {"head": 64, "value_head": 128}, options)})
    taken, forward = [], gluon_launch.forward
    monkeypatch.setattr(gluon_launch, "_interpreted", lambda: False)
    monkeypatch.setattr(gluon_launch, "LEAST_ROWS", 1)
    monkeypatch.setattr(gluon_launch, "forward", lambda *arguments: taken.append(forward(*arguments)))
    with nothing_waits(), torch.no_grad():
        thought_attention(*inputs, **options, backend="triton")
    assert taken == [None]
