"""The package's query gradient in Gluon, in several orders of warps; for `pytest --emulate sm_90`.

What no row sees is NaN here. The tables of rows are compared with those of the kernel in Triton.
"""

import pytest
import torch
from thought_attention_cases import make_inputs
from tolerances import assert_as_accurate

from ptx.launches import schedule
from quietstar.ops import thought_attention
from quietstar.ops.thought_attention import backend_triton, gluon_backward_key, gluon_launch
from quietstar.ops.thought_attention.inputs import Inputs, Mask, Result, ResultGradients


def spread(count, length):
    return [(7 + 31 * i) % length for i in range(count)]


ONE = {"batch": 1, "query_heads": 4, "kv_heads": 1}
SMALL = ONE | {"length": 500, "num_anchors": 12, "steps": 4, "head": 64}  # 2 tiles, up to 6 full blocks of keys
SPREAD = spread(12, 500)
LATE = [480 + i for i in range(12)]  # 7 full blocks
SOME_INACTIVE = [anchor if i % 5 else -1 for i, anchor in enumerate(SPREAD)]
LENGTHS = [i % 5 for i in range(12)]
CASES = {
    "small": (SMALL, {"anchors": LATE}),
    "D = 128": (SMALL | {"steps": 14, "num_anchors": 9, "head": 128}, {"anchors": LATE[:9]}),
    "every position": (ONE | {"length": 90, "steps": 3, "head": 128}, {}),
    "less than a group": (ONE | {"length": 3, "steps": 1, "head": 128}, {}),
    "sampling": (SMALL | {"num_anchors": 40, "steps": 1, "thought_steps": 7}, {"anchors": spread(40, 300)}),
    "unsorted, inactive": (SMALL, {"anchors": SOME_INACTIVE}),
    "all inactive but one": (SMALL, {"anchors": [-1] * 11 + [300]}),
    "window, padding": (SMALL | {"batch": 2}, {"anchors": SOME_INACTIVE, "window": 140, "key_start": [0, 37]}),
    "window from the step": (SMALL, {"anchors": LATE, "window": 300, "window_from": "step"}),
    "window of own steps": (SMALL, {"anchors": SPREAD, "window": 2, "window_from": "step"}),
    "documents": (SMALL, {"anchors": LATE, "key_start": [[200 + 7 * i for i in range(12)]]}),
    "documents behind their anchors": (SMALL, {"anchors": spread(12, 400), "key_start": [[450] * 12]}),
    "lengths, both ways": (SMALL, {"anchors": SOME_INACTIVE, "thought_lengths": LENGTHS, "causal": False}),
    "T = 40": (SMALL | {"thought_steps": 40, "head": 128}, {"anchors": SPREAD}),
    "softcap, negative scale": (SMALL, {"anchors": LATE, "softcap": 1.2, "scale": -0.8}),
    "D = 80, Dv = 128, group of 3": (
        SMALL | {"query_heads": 6, "kv_heads": 2, "head": 80, "value_head": 128}, {"anchors": LATE},
    ),
}  # fmt: skip


def references(inputs, options, grads):
    """Results, eager and exact gradients to the query, and the inputs and dO with NaN where nothing comes of them."""
    gradients = []
    for wide in (None, torch.float64):
        leaves = [x.detach().to(wide or x.dtype).requires_grad_() for x in inputs]
        results = thought_attention(*leaves, **options, return_lse=True, backend="reference")
        weights = [grad.to(result.dtype) for grad, result in zip(grads, results, strict=True)]
        gradients.append(torch.autograd.grad(results, leaves, weights))
    eager, oracle = gradients
    inactive = results[1].isneginf()[..., None]
    base, thought = (oracle[i].eq(0).all(-1, keepdim=True) for i in (2, 4))
    hidden = inactive, base, base, thought, thought
    poisoned = [x.detach().masked_fill(mask, float("nan")) for x, mask in zip(inputs, hidden, strict=True)]
    results = Result(results[0].detach().to(inputs[0].dtype), results[1].detach().float())
    poisoned_grads = ResultGradients(grads[0].masked_fill(inactive, float("nan")), grads[1])
    return results, eager[0], oracle[0], Inputs(*poisoned), poisoned_grads


class Tables:
    """In the place of the kernel of the key gradient: keeps the tables that it is given."""

    def __getitem__(self, grid):
        return lambda *arguments, **_: setattr(self, "found", arguments[7:13])


@pytest.fixture
def tables(monkeypatch):
    found = Tables()
    monkeypatch.setattr(backend_triton, "key_gradient_kernel", found)
    monkeypatch.setattr(backend_triton, "thought_gradient_kernel", Tables())
    monkeypatch.setattr(gluon_backward_key, "unavailable", lambda *_: "its tables are looked at")
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_right(name, dtype, tables, emulated_launches, monkeypatch):
    sizes, options = CASES[name]
    options = {key: torch.tensor(x) if isinstance(x, list) else x for key, x in options.items()}
    inputs = make_inputs(**sizes, dtype=dtype)
    rows = inputs[0].shape[:-1]
    grads = torch.randn(*rows, inputs[2].shape[-1], dtype=dtype), torch.randn(rows)
    results, eager, oracle, inputs, grads = references(inputs, options, grads)
    arguments = grads, inputs, Mask.of(inputs, **options), results
    first = None
    for schedule.order in range(7) if name == "small" else (3, 4, 5):
        actual = backend_triton.backward(*arguments).query
        assert_as_accurate(actual, eager, oracle, unit=dtype, name="gradient to the query")
        first = actual if first is None else first
        assert torch.equal(actual, first)  # to the bit
    assert "gluon_query_gradient_kernel" in {launch.name for launch in emulated_launches}

    found = tables.found
    monkeypatch.setattr(gluon_launch, "unavailable", lambda *_: "not now")
    backend_triton.backward(*arguments)
    for table, expected in zip(found, tables.found, strict=True):
        if table is None or not table.is_floating_point():
            assert table is expected is None or torch.equal(table, expected)
        else:  # delta is a sum
            torch.testing.assert_close(table, expected, rtol=1e-5, atol=1e-5)
