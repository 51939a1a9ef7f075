"""What autocast does to the inputs of ops."""

import pytest
import torch

from quietstar.ops._precision import autocast_inputs, autocast_off

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64


def dtypes(device="cpu"):
    tensors = [torch.zeros(2, dtype=dtype, device=device) for dtype in DTYPES]
    return [None if x is None else x.dtype for x in autocast_inputs(*tensors, None)]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_floating_inputs_follow_autocast(half, cache):
    followed = [half, half, half, torch.float64, torch.int64, None]
    as_they_are = [*DTYPES, None]
    assert dtypes() == as_they_are
    with torch.autocast("cpu", dtype=half, cache_enabled=cache):
        assert dtypes() == followed
        assert dtypes("meta") == as_they_are
        with torch.autocast("cpu", enabled=False):
            assert dtypes() == as_they_are
            with torch.autocast("cpu", dtype=half):
                assert dtypes() == followed
        with autocast_off(torch.device("cpu")):
            assert dtypes() == as_they_are
        with torch.autocast("cuda", dtype=torch.float16, enabled=False):
            assert dtypes() == followed


def test_nothing_is_copied_that_need_not_be():
    x = torch.zeros(2)
    assert autocast_inputs(x)[0] is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = x.bfloat16()
        assert autocast_inputs(half)[0] is half


def test_gradients_arrive_in_the_dtype_of_the_input():
    x = torch.ones(2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (cast,) = autocast_inputs(x)
    cast.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta", "xpu"])
def test_autocast_is_off_on_every_kind_of_device(device):
    """Some know no autocast, and say so by an error."""
    with autocast_off(torch.device(device)):
        pass
