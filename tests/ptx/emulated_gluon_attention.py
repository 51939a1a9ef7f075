"""The package's forward in Gluon on several blocks of keys, in several orders of warps; for `pytest --emulate sm_90`.

What no row sees is NaN here.
"""

import pytest
import torch
from thought_attention_cases import make_inputs
from tolerances import assert_as_accurate

from ptx.launches import schedule
from quietstar.ops import thought_attention
from quietstar.ops.thought_attention import triton_launch


def spread(count, length):
    return [(7 + 31 * i) % length for i in range(count)]


ONE = {"batch": 1, "query_heads": 4, "kv_heads": 1}
SMALL = ONE | {"length": 500, "num_anchors": 16, "steps": 4, "head": 64}  # 2 tiles, up to 4 blocks of keys
# A group of consumers has four anchors of these; sorted, six inactive ones are all of a group and half of the next.
SOME_INACTIVE = [anchor if i % 3 else -1 for i, anchor in enumerate(spread(16, 500))]
LENGTHS = [i % 5 for i in range(16)]
STARTS = [[max(0, anchor - 200) for anchor in spread(16, 500)]]
CASES = {
    "small": (SMALL, {"anchors": spread(16, 500)}),
    "every position": (ONE | {"length": 150, "steps": 14, "head": 128}, {}),
    "sampling": (
        ONE | {"length": 300, "num_anchors": 64, "steps": 1, "thought_steps": 12, "head": 128},
        {"anchors": spread(64, 300)},
    ),
    "first step": (ONE | {"length": 260, "steps": 1, "head": 128}, {}),
    "inactive": (SMALL, {"anchors": SOME_INACTIVE}),
    "all inactive but one": (SMALL, {"anchors": [-1] * 15 + [300]}),
    "window": (SMALL | {"batch": 2}, {"anchors": SOME_INACTIVE, "window": 140, "key_start": [0, 37]}),
    "window from the step": (SMALL, {"anchors": spread(16, 500), "window": 130, "window_from": "step"}),
    "window of own steps": (SMALL, {"anchors": spread(16, 500), "window": 2, "window_from": "step"}),
    "padding": (SMALL | {"batch": 2, "num_anchors": 500}, {"key_start": [200, 0]}),
    "documents": (SMALL, {"anchors": spread(16, 500), "key_start": STARTS}),
    "documents behind their anchors": (SMALL, {"anchors": spread(16, 400), "key_start": [[450] * 16]}),
    "lengths": (SMALL, {"anchors": SOME_INACTIVE, "thought_lengths": LENGTHS}),
    "lengths, both ways": (SMALL, {"anchors": spread(16, 500), "thought_lengths": LENGTHS, "causal": False}),
    "both ways, S < T": (SMALL | {"thought_steps": 9}, {"anchors": spread(16, 500), "causal": False}),
    "T = 20": (SMALL | {"thought_steps": 20, "head": 128}, {"anchors": spread(16, 500)}),
    "T = 130": (SMALL | {"thought_steps": 130}, {"anchors": spread(16, 500)}),
    "softcap, negative scale": (SMALL, {"anchors": spread(16, 500), "softcap": 1.2, "scale": -0.8}),
    "D = 80, Dv = 128, group of 3": (
        SMALL | {"query_heads": 6, "kv_heads": 2, "head": 80, "value_head": 128}, {"anchors": spread(16, 500)},
    ),
    "D = 256, sampling": (
        ONE | {"length": 200, "num_anchors": 32, "steps": 1, "thought_steps": 12, "head": 256},
        {"anchors": spread(32, 200)},
    ),
    "D = 192, Dv = 128": (SMALL | {"head": 192, "value_head": 128}, {"anchors": spread(16, 500)}),
    "D = 128, Dv = 40": (SMALL | {"head": 128, "value_head": 40}, {"anchors": spread(16, 500)}),
}  # fmt: skip


def references(inputs, options):
    """Output and lse in the dtype and in float64, and the inputs with NaN where nothing comes of them."""
    eager = [x.detach() for x in thought_attention(*inputs, **options, return_lse=True, backend="reference")]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    oracle = thought_attention(*wide, **options, return_lse=True, backend="reference")
    base, thought = (grad[..., :1] == 0 for grad in torch.autograd.grad(oracle[0].sum(), [wide[2], wide[4]]))
    unseen = [oracle[1].isneginf()[..., None], base, base, thought, thought]
    poisoned = [x.detach().masked_fill(mask, float("nan")) for x, mask in zip(inputs, unseen, strict=True)]
    return eager, [x.detach() for x in oracle], poisoned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_right(name, dtype, emulated_launches, monkeypatch):
    monkeypatch.setattr(triton_launch, "processors", lambda device: 1)  # so that no keys are split over programs
    shapes, options = CASES[name]
    options = {key: torch.tensor(x) if isinstance(x, list) else x for key, x in options.items()}
    inputs = make_inputs(**shapes, dtype=dtype)
    eager, oracle, poisoned = references(inputs, options)
    first = None
    for schedule.order in range(7) if name == "small" else (3, 4, 5):
        with torch.no_grad():
            actual = thought_attention(*poisoned, **options, return_lse=True, backend="triton")
        for which, *values in zip(("output", "lse"), actual, eager, oracle, strict=True):
            assert_as_accurate(*values, unit=dtype, name=which)
        first = first or actual
        assert all(map(torch.equal, actual, first))  # to the bit
    assert {launch.name for launch in emulated_launches} == {"gluon_forward_kernel"}
