"""The package's key gradient in Gluon, in several orders of warps; for `pytest --emulate sm_90`.

Anchors are in order here, or all positions, so that all of the work is its.
"""

import pytest
import torch
from thought_attention_cases import make_inputs
from tolerances import assert_as_accurate

from ptx.launches import schedule
from quietstar.ops import thought_attention
from quietstar.ops.thought_attention import backend_triton, triton_launch

ONE = {"batch": 1, "query_heads": 4, "kv_heads": 1}
SMALL = ONE | {"length": 205, "steps": 2, "head": 64}  # 2 blocks of keys, up to 26 tiles of rows, not whole ones
SPREAD = [12 * i for i in range(24)]
SOME = ONE | {"length": 300, "num_anchors": 24, "steps": 3, "head": 64}
STARTS = [[max(0, anchor - 150) for anchor in SPREAD]]
CASES = {
    "small": (SMALL, {}),
    "D = 128": (SMALL | {"steps": 4, "head": 128}, {}),
    "less than a tile": (ONE | {"length": 3, "steps": 1, "head": 128}, {}),
    "a head for each": (SMALL | {"kv_heads": 4, "batch": 2, "length": 150}, {}),
    "group of 16": (SMALL | {"query_heads": 16, "steps": 1}, {}),
    "D = 80, Dv = 128": (SMALL | {"head": 80, "value_head": 128}, {}),
    "D = 128, Dv = 40": (SMALL | {"head": 128, "value_head": 40}, {}),
    "padding": (SMALL | {"batch": 2}, {"key_start": [150, 0]}),
    "window": (SMALL, {"window": 70}),
    "window from the step": (SMALL | {"steps": 6}, {"window": 70, "window_from": "step"}),
    "anchors": (SOME, {"anchors": SPREAD}),
    "anchors, some inactive": (SOME, {"anchors": [-1, -1, *SPREAD[2:]]}),
    "repeated anchors": (SOME, {"anchors": [0] * 8 + [130] * 8 + [299] * 8}),
    "anchors, window, padding": (SOME | {"batch": 2}, {"anchors": SPREAD, "window": 90, "key_start": [0, 37]}),
    "documents": (SOME, {"anchors": SPREAD, "key_start": STARTS}),
    "scale of zero": (SMALL | {"length": 20}, {"scale": 0.0}),
    "negative scale": (SMALL | {"length": 20}, {"scale": -0.4}),
}  # fmt: skip
SPLIT = "small", "window", "anchors, window, padding", "documents"


def laid_out(tensor):
    """[B, H, (P,) S, D] as transformers has it in memory."""
    flat = tensor.detach().flatten(2, -2).transpose(1, 2).contiguous().transpose(1, 2)
    return flat.unflatten(2, tensor.shape[2:-1])


def solve(inputs, options, grads, backend, dtype=None):
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
    results = thought_attention(*leaves, **options, return_lse=True, backend=backend)
    torch.autograd.backward(results, [grad.to(result.dtype) for grad, result in zip(grads, results, strict=True)])
    return leaves[1].grad, leaves[2].grad


def assert_right(name, dtype, orders, monkeypatch):
    monkeypatch.setattr(backend_triton, "key_gradient_kernel", _Nothing())
    sizes, options = CASES[name]
    options = {key: torch.tensor(x) if isinstance(x, list) else x for key, x in options.items()}
    inputs = [laid_out(x) for x in make_inputs(**sizes, dtype=dtype)]
    rows = inputs[0].shape[:-1]
    grads = laid_out(torch.randn(*rows, inputs[2].shape[-1], dtype=dtype)), torch.randn(rows)
    eager, oracle = (solve(inputs, options, grads, "reference", wide) for wide in (None, torch.float64))
    first = None
    for schedule.order in orders:
        actual = solve(inputs, options, grads, "triton")
        for which, *values in zip(("key", "value"), actual, eager, oracle, strict=True):
            assert_as_accurate(*values, unit=dtype, name=f"gradient to the {which}")
        first = first or actual
        assert all(map(torch.equal, actual, first))  # to the bit


class _Nothing:
    """In the place of the kernel in Triton."""

    def __getitem__(self, grid):
        return lambda *_, **__: None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_right(name, dtype, emulated_launches, monkeypatch):
    assert_right(name, dtype, (0, 3, 4, 5), monkeypatch)
    assert "gluon_key_gradient_kernel" in {launch.name for launch in emulated_launches}


@pytest.mark.parametrize("name", SPLIT)
def test_rows_split_over_programs(name, monkeypatch):
    monkeypatch.setattr(triton_launch, "processors", lambda device: 6)
    monkeypatch.setattr(triton_launch, "SPLIT_ROWS", 64)
    assert_right(name, torch.bfloat16, (0, 3), monkeypatch)
