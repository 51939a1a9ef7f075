"""When the key gradient in Gluon runs, among the calls that kernels in Gluon can take."""

import pytest
import torch
from ptx.emulated import needs_gluon
from thought_attention_cases import make_inputs

from quietstar.ops.thought_attention.inputs import Inputs, Mask

pytestmark = needs_gluon


def reason(change=lambda x: x, options=None, **sizes):
    """``change`` is made to the query, with the gradient of the output left as it is."""
    from quietstar.ops.thought_attention.gluon_backward_key import unavailable

    inputs = Inputs(*(x.detach() for x in make_inputs(head=64, dtype=torch.bfloat16, **sizes)))
    mask = Mask.of(inputs, **(options or {}))
    return unavailable(torch.empty_like(inputs.query), change(inputs.query), inputs.key, mask)


def as_transformers(x):
    return x.flatten(2, 3).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, x.shape[2:4])


AVAILABLE = {
    "contiguous": {},
    "as transformers has it": {"change": as_transformers},
    "one step": {"change": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2), "steps": 1},
    "one head for each": {"kv_heads": 4},
    "window, padding": {"options": {"window": 3, "key_start": torch.tensor([0, 2])}},
}


@pytest.mark.parametrize("name", AVAILABLE)
def test_available(name):
    assert reason(**AVAILABLE[name]) is None


UNAVAILABLE = {
    "heads of 136": (
        {"change": lambda x: x.repeat(1, 1, 1, 1, 3)[..., :136]},
        "needs heads of at most 128 elements, got 136",
    ),
    "a group of 3": ({"query_heads": 6}, "needs a power of two, at most 64, of query heads to each key head, got 3"),
    "softcap": ({"options": {"softcap": 3.0}}, "has no softcap"),
    "lengths": ({"options": {"thought_lengths": torch.tensor([1, 2, 3, 1, 2, 3])}}, "has no thought_lengths"),
    "anchors apart": (
        {"change": lambda x: torch.cat((x, x), dim=3)[:, :, :, :3]},
        "needs the steps of query as far apart across anchors as within one, got strides (9216, 2304, 384, 64, 1)",
    ),
    "misaligned rows": (
        {"change": lambda x: torch.cat((x, x[..., :4]), dim=-1)[..., :64]},
        "needs vectors of query 16 bytes, or a multiple, apart, got strides (4896, 1224, 204, 68, 1)",
    ),
}


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_unavailable(name):
    call, said = UNAVAILABLE[name]
    assert reason(**call) == said


@pytest.mark.parametrize(("anchors", "in_order"), [([0, 2, 2], 1), ([-1, 0, 2], 1), ([2, 0, 2], 0), ([0, 2, -1], 0)])
def test_which_anchors_are_in_order(anchors, in_order):
    from quietstar.ops.thought_attention.backend_triton import _Seen

    inputs = Inputs(*make_inputs(num_anchors=3))
    seen = _Seen.of(inputs, Mask.of(inputs, torch.tensor(anchors)))
    assert seen.in_order().tolist() == in_order
    assert seen.in_order().dtype == torch.int32


def test_all_positions_are_in_order():
    from quietstar.ops.thought_attention.backend_triton import _Seen

    inputs = Inputs(*make_inputs())
    assert _Seen.of(inputs, Mask.of(inputs)).in_order() is None
