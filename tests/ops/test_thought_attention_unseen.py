"""What no row of a sequence sees may hold anything: it changes no result and gets no gradient, in every backend."""

import math

import pytest
import torch
from thought_attention_cases import case

from quietstar.ops import thought_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Tiles of rows and blocks of keys end inside of what is unseen, and the windows of anchors leave gaps.
ONE = {"batch": 1, "query_heads": 2, "kv_heads": 1}
CASES = {
    "behind the last anchor": (ONE | {"num_anchors": 2, "length": 70}, {"anchors": [5, 37]}),
    "left padding": ({"kv_heads": 1, "query_heads": 1, "length": 40, "steps": 2}, {"key_start": [3, 33]}),
    "padding over everything": ({"length": 5}, {"key_start": [5, 2]}),
    "between windows": ({"num_anchors": 3, "length": 90}, {"anchors": [[80, 7, 40], [1, -1, 60]], "window": 5}),
    "many windows": (
        ONE | {"num_anchors": 35, "length": 70, "steps": 1},
        {"anchors": [(37 * i) % 99 % 70 for i in range(35)], "window": 2},
    ),
    "inactive anchors": (ONE | {"num_anchors": 5}, {"anchors": [5, -1, 2, 2, -1]}),
    "inactive anchors, S < T": (
        ONE | {"num_anchors": 35, "steps": 1, "thought_steps": 3}, {"anchors": [i % 4 - 1 for i in range(35)]},
    ),
    "inactive per batch, all of them in one": ({"num_anchors": 3}, {"anchors": [[-1, 4, -1], [-1, -1, -1]]}),
    "between documents": (
        {"num_anchors": 3, "length": 90},
        {"anchors": [[80, 7, 40], [1, -1, 60]], "key_start": [[70, 4, 41], [0, 0, 33]]},
    ),
    "many documents": (
        ONE | {"num_anchors": 35, "length": 70, "steps": 1},
        {"anchors": [i * 2 for i in range(35)], "key_start": [[i * 2 // 10 * 10 + 3 for i in range(35)]]},
    ),
    "no document in front of an anchor": (
        {"num_anchors": 2, "length": 40}, {"anchors": [5, 30], "key_start": [[6, 40], [31, 38]]},
    ),
    "a bit of everything": (
        {"num_anchors": 3, "length": 64}, {"anchors": [[50, 20, -1], [63, -1, 3]], "window": 9, "key_start": [15, 0]},
    ),
}  # fmt: skip


def half(backend):
    return torch.bfloat16 if backend == "cpu" else torch.float16


def unseen(inputs, anchors=None, key_start=None, window=None):
    """Base keys that no row sees, bool [B, L], and inactive anchors, bool [B, P]; one by one."""
    query, key = inputs[:2]
    batch, length = key.shape[0], key.shape[2]
    anchors = torch.arange(length) if anchors is None else anchors
    anchors = anchors.expand(batch, -1).cpu()
    starts = torch.zeros(batch, 1, dtype=torch.int64) if key_start is None else key_start.view(batch, -1).cpu()
    starts = starts.expand(anchors.shape)
    keys = torch.ones(batch, length, dtype=torch.bool)
    for b in range(batch):
        for a, start in zip(anchors[b].tolist(), starts[b].tolist(), strict=True):
            keys[b, max(start, 0 if window is None else a - window + 1) : a + 1] = False
    return keys.to(query.device), (anchors < 0).to(query.device)


def run(inputs, options, backend, grads):
    """Output, lse and, of backends that have them, gradients."""
    leaves = [x.detach().requires_grad_(backend != "cuda") for x in inputs]
    output, lse = thought_attention(*leaves, **options, return_lse=True, backend=backend)
    if backend == "cuda":
        return output, lse
    return output, lse, *torch.autograd.grad((output, lse), leaves, grads)


@pytest.mark.parametrize("junk", [math.nan, math.inf])
@pytest.mark.parametrize("name", CASES)
def test_it_changes_nothing(name, junk, every_backend, device):
    dtype = torch.float32 if math.isnan(junk) else half(every_backend)
    inputs, options = case(name, dtype, device, CASES)
    keys, anchors = unseen(inputs, **options)
    keys, rows, vectors = keys[:, None, :, None], anchors[:, None, :, None], anchors[:, None, :, None, None]
    hidden = vectors, keys, keys, vectors, vectors  # of each input
    inputs = [x.detach() for x in inputs]
    grads = torch.randn_like(inputs[0]), torch.randn(inputs[0].shape[:-1], device=device)

    clean = run(inputs, options, every_backend, grads)
    spoiled = [x.masked_fill(mask, junk) for x, mask in zip(inputs, hidden, strict=True)]
    grads = grads[0].masked_fill(vectors, junk), grads[1].masked_fill(rows, junk)
    for actual, expected in zip(run(spoiled, options, every_backend, grads), clean, strict=True):
        assert torch.equal(actual, expected)

    output, lse, *gradients = clean
    assert not output.masked_select(vectors).any()
    assert (lse.masked_select(rows) == -math.inf).all()
    for gradient, mask in zip(gradients, hidden, strict=False):
        assert not gradient.masked_select(mask).any()


@pytest.mark.parametrize("which", [1, 2, 3, 4], ids=["key", "value", "thought_key", "thought_value"])
@pytest.mark.parametrize("name", ["a bit of everything", "left padding"])
def test_what_is_seen_is_not_overlooked(name, which, every_backend, device):
    """A NaN that a row sees is in its output, not taken for nothing to see."""
    inputs, options = case(name, device=device, cases=CASES)
    with torch.no_grad():
        inputs[which][0, :, -1] = math.nan  # the last key, or what belongs to the last anchor
        options["anchors"] = torch.full((inputs[0].shape[2],), inputs[1].shape[2] - 1, device=device)
        output, lse = thought_attention(*inputs, **options, return_lse=True, backend=every_backend)
    assert output[0, :, -1].isnan().all()
    assert lse[0, :, -1].isnan().all() == (which in (1, 3))
