"""What the tests of the examples share."""

import importlib
import sys

import pytest
import torch
from torch.nn import functional as F


@pytest.fixture
def example(request):
    """The example that the test file is named after."""
    name = request.path.stem.removeprefix("test_")
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def dense_attention(query, key, value, own_key, own_value, anchors=None, thought_lengths=None, causal=True):
    """Thought attention as trainers write it: all keys side by side, [L + P·T] of them, under one mask."""
    batch, _, num_anchors, steps = query.shape[:4]
    length = key.shape[2]
    anchors = torch.arange(length).expand(batch, -1) if anchors is None else anchors
    lengths = torch.full_like(anchors, steps) if thought_lengths is None else thought_lengths
    row_anchor, row_step = torch.arange(num_anchors * steps) // steps, torch.arange(num_anchors * steps) % steps
    base = torch.arange(length) <= anchors[:, row_anchor, None]
    exists = row_step < lengths[:, row_anchor]
    own = (row_anchor[:, None] == row_anchor) & exists[:, None]
    if causal:
        own = own & (row_step <= row_step[:, None])
    mask = torch.cat([base, own], dim=2)[:, None]
    keys, values = (torch.cat(pair, dim=2) for pair in ((key, own_key.flatten(2, 3)), (value, own_value.flatten(2, 3))))
    output = F.scaled_dot_product_attention(query.flatten(2, 3), keys, values, attn_mask=mask, enable_gqa=True)
    return (output * exists[:, None, :, None]).unflatten(2, (num_anchors, steps))


@pytest.fixture(name="dense_attention")
def _dense_attention():
    return dense_attention


def assert_same(actual, expected, leaves):
    """Same values, and same gradients of a random weighting of them."""
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(actual)
    gradients = [torch.autograd.grad((x * weights).sum(), leaves) for x in (actual, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture(name="assert_same")
def _assert_same():
    return assert_same
