"""What no row of a sequence sees may hold anything: it changes no result and gets no gradient, in every backend."""

import itertools
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
    "steps that do not exist": (
        {"num_anchors": 5, "length": 40, "steps": 4},
        {"anchors": [3, 39, -1, 5, 20], "thought_lengths": [[4, 0, 3, 2, 1], [0, 0, 4, 0, 0]]},
    ),
    "steps that do not exist, S < T, both ways": (
        {"num_anchors": 4, "length": 40, "steps": 2, "thought_steps": 5},
        {"anchors": [3, 20, 39, 38], "thought_lengths": [5, 4, 3, 1], "causal": False},
    ),
    "no steps behind the last positions": ({}, {"thought_lengths": [3, 1, 2, 3, 0, 0]}),
    "many steps that do not exist": (
        ONE | {"num_anchors": 35, "length": 70, "steps": 2, "thought_steps": 3},
        {"anchors": [(37 * i) % 70 for i in range(35)], "thought_lengths": [i * 3 % 7 % 4 for i in range(35)]},
    ),
    "windows from steps": (
        {"num_anchors": 3, "length": 90, "steps": 3, "thought_steps": 7},
        {"anchors": [[80, 7, 40], [1, -1, 60]], "window": 6, "window_from": "step"},
    ),
    "own steps out of the window": (
        {"num_anchors": 3, "length": 40, "steps": 2, "thought_steps": 70},
        {"anchors": [39, 2, 5], "window": 3, "window_from": "step", "thought_lengths": [70, 69, 68], "causal": False},
    ),
    "all options, values of another size": (
        {"num_anchors": 4, "length": 64, "steps": 3, "thought_steps": 5, "value_head": 12},
        {
            "anchors": [[50, 20, -1, 8], [63, 11, 3, 3]], "window": 4, "window_from": "step", "key_start": [15, 0],
            "thought_lengths": [[5, 3, 4, 2], [4, 5, 0, 5]], "causal": False, "softcap": 1.5,
        },
    ),
}  # fmt: skip


def half(backend):
    return torch.bfloat16 if backend == "cpu" else torch.float16


def unseen(inputs, anchors=None, key_start=None, thought_lengths=None, window=math.inf, window_from="anchor", **_):
    """What no row sees, one by one: base keys, bool [B, L], queries [B, P, S] and thought keys [B, P, T]."""
    query, key, _, thought_key, _ = inputs
    (batch, _, num_anchors, steps), length, thought_steps = query.shape[:4], key.shape[2], thought_key.shape[3]
    anchors = torch.arange(length) if anchors is None else anchors
    starts = torch.zeros(batch, 1, dtype=torch.int64) if key_start is None else key_start.view(batch, -1)
    lengths = torch.tensor(thought_steps) if thought_lengths is None else thought_lengths
    anchors, starts, lengths = (x.expand(batch, num_anchors).tolist() for x in (anchors, starts, lengths))
    keys, rows, own = (
        torch.ones(shape, dtype=torch.bool)
        for shape in ((batch, length), (batch, num_anchors, steps), (batch, num_anchors, thought_steps))
    )
    for b, p, s in itertools.product(range(batch), range(num_anchors), range(steps)):
        a, step = anchors[b][p], thought_steps - steps + s
        if a < 0 or step >= lengths[b][p]:
            continue
        rows[b, p, s] = False
        from_step = window_from == "step"
        keys[b, max(starts[b][p], a + (1 + step if from_step else 0) + 1 - min(window, 999)) : a + 1] = False
        # With causal=False a step sees later ones too, but so do those themselves.
        own[b, p, max(0, step + 1 - min(window, 999)) if from_step else 0 : lengths[b][p]] = False
    return [x.to(query.device) for x in (keys, rows, own)]


def run(inputs, options, backend, grads):
    """Output, lse and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output, lse = thought_attention(*leaves, **options, return_lse=True, backend=backend)
    return output, lse, *torch.autograd.grad((output, lse), leaves, grads)


@pytest.mark.parametrize("junk", [math.nan, math.inf])
@pytest.mark.parametrize("name", CASES)
def test_it_changes_nothing(name, junk, every_backend, device):
    dtype = torch.float32 if math.isnan(junk) else half(every_backend)
    inputs, options = case(name, dtype, device, CASES)
    keys, rows, own = (x[:, None] for x in unseen(inputs, **options))
    keys, vectors, own = (x[..., None] for x in (keys, rows, own))
    hidden = vectors, keys, keys, own, own  # of each input
    inputs = [x.detach() for x in inputs]
    shape = inputs[0].shape[:-1]
    grads = torch.randn(*shape, inputs[2].shape[-1], dtype=dtype, device=device), torch.randn(shape, device=device)

    clean = run(inputs, options, every_backend, grads)
    spoiled = [x.masked_fill(mask, junk) for x, mask in zip(inputs, hidden, strict=True)]
    grads = grads[0].masked_fill(vectors, junk), grads[1].masked_fill(rows, junk)
    for actual, expected in zip(run(spoiled, options, every_backend, grads), clean, strict=True):
        assert torch.equal(actual, expected)

    output, lse, *gradients = clean
    assert not output.masked_select(vectors).any()
    assert (lse.masked_select(rows) == -math.inf).all()
    for gradient, mask in zip(gradients, hidden, strict=True):
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
