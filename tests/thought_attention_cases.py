"""Calls of thought attention that the tests of all backends share."""

import random

import torch

INPUTS = ("query", "key", "value", "thought_key", "thought_value")


def make_inputs(batch=2, query_heads=4, kv_heads=2, length=6, num_anchors=None, steps=3, thought_steps=None, head=8,
                value_head=None, dtype=torch.float32, device="cpu"):  # fmt: skip
    num_anchors = length if num_anchors is None else num_anchors
    thought_steps = steps if thought_steps is None else thought_steps
    sizes = head, head if value_head is None else value_head
    shapes = [(batch, query_heads, num_anchors, steps, head)]
    shapes += [(batch, kv_heads, length, size) for size in sizes]
    shapes += [(batch, kv_heads, num_anchors, thought_steps, size) for size in sizes]
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


CASES = {
    "all positions": ({}, {}),
    "earlier steps cached (S < T)": ({"steps": 2, "thought_steps": 5}, {}),
    "sampling step (S = 1)": ({"steps": 1, "thought_steps": 4}, {}),
    "first sampling step (S = T = 1)": ({"steps": 1}, {}),
    "long thoughts (T = 40)": ({"length": 3, "steps": 4, "thought_steps": 40}, {}),
    "one anchor": ({"num_anchors": 1}, {"anchors": [4]}),
    "one anchor in front": ({"num_anchors": 1}, {"anchors": [0]}),
    "repeated anchors": ({"num_anchors": 12}, {"anchors": [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]}),
    "a prefix of the positions, repeated": ({"num_anchors": 8}, {"anchors": [0, 0, 1, 1, 2, 2, 3, 3]}),
    "unsorted, repeated, inactive": ({"num_anchors": 5}, {"anchors": [5, -1, 2, 2, 0]}),
    "all inactive": ({"num_anchors": 2}, {"anchors": [-1, -1]}),
    "anchors per batch": ({"num_anchors": 3}, {"anchors": [[0, 3, 5], [-1, 1, 1]]}),
    "window": ({}, {"window": 2}),
    "window of one": ({}, {"window": 1}),
    "window that hides nothing": ({}, {"window": 6}),
    "left padding": ({}, {"key_start": [2, 0]}),
    "left padding over everything": ({}, {"key_start": [6, 5]}),
    "window, padding, anchors": ({"num_anchors": 3}, {"anchors": [5, 1, -1], "window": 3, "key_start": [0, 2]}),
    "packed documents": (
        {"length": 9},
        {"key_start": [[0, 0, 0, 3, 3, 5, 5, 5, 5], [0, 0, 2, 2, 4, 4, 4, 7, 7]]},
    ),
    "one document in front of its anchors, one behind": (
        {"num_anchors": 4},
        {"anchors": [2, 4, 4, 5], "key_start": [[0, 3, 1, 6], [3, 5, 0, 2]]},
    ),
    "all documents behind their anchors": ({"num_anchors": 2}, {"anchors": [1, 4], "key_start": [[2, 6], [6, 6]]}),
    "documents, unsorted, repeated, inactive anchors": (
        {"num_anchors": 6},
        {"anchors": [[5, -1, 3, 3, 0, 4], [2, 5, 5, -1, -1, 1]], "key_start": [[4, 2, 0, 3, 0, 4], [1, 0, 5, 6, 0, 2]]},
    ),
    "documents, window, S < T": (
        {"num_anchors": 5, "steps": 2, "thought_steps": 4},
        {"anchors": [5, 0, 3, 4, -1], "window": 3, "key_start": [[4, 0, 0, 3, 0], [0, 0, 2, 2, 6]]},
    ),
    "documents, sampling step (S = 1)": (
        {"steps": 1, "thought_steps": 4, "kv_heads": 4},
        {"key_start": [[0, 0, 2, 2, 2, 5], [0, 1, 1, 1, 4, 4]]},
    ),
    "documents, multi-query, one anchor": (
        {"num_anchors": 1, "kv_heads": 1},
        {"anchors": [4], "key_start": [[3], [5]]},
    ),
    "multi-head": ({"kv_heads": 4}, {}),
    "multi-query": ({"kv_heads": 1}, {}),
    "odd head size, scale": ({"head": 5}, {"scale": 0.7}),
    "steps see each other": ({}, {"causal": False}),
    "steps see each other, S < T": ({"steps": 2, "thought_steps": 5}, {"causal": False}),
    "drafted blocks behind some anchors": (
        {"length": 9, "num_anchors": 4, "steps": 5, "kv_heads": 4},
        {"anchors": [7, 0, -1, 3], "causal": False, "key_start": [[4, 0, 0, 2], [0, 0, 9, 0]]},
    ),
    "thought lengths": ({}, {"thought_lengths": [3, 0, 1, 2, 3, 0]}),
    "thought lengths per batch, S < T": (
        {"steps": 2, "thought_steps": 4},
        {"thought_lengths": [[4, 3, 2, 1, 0, 4], [0, 4, 3, 3, 1, 2]]},
    ),
    "thought lengths, steps see each other, anchors": (
        {"num_anchors": 5, "steps": 4},
        {"anchors": [[5, -1, 2, 2, 0], [1, 1, 1, -1, 4]], "thought_lengths": [4, 2, 3, 0, 1], "causal": False},
    ),
    "thought lengths, sampling step (S = 1)": (
        {"steps": 1, "thought_steps": 4},
        {"thought_lengths": [4, 3, 4, 0, 4, 4]},
    ),
    "no thought has a step": ({}, {"thought_lengths": [0] * 6}),
    "window from the step": ({}, {"window": 2, "window_from": "step"}),
    "window from the step, of one": ({}, {"window": 1, "window_from": "step"}),
    "window from the step, S < T": ({"steps": 2, "thought_steps": 5}, {"window": 3, "window_from": "step"}),
    "window from the step, sampling step (S = 1)": (
        {"steps": 1, "thought_steps": 4},
        {"window": 5, "window_from": "step"},
    ),
    "window from the step that hides only own steps": (
        {"num_anchors": 2, "length": 2, "steps": 5},
        {"window": 4, "window_from": "step"},
    ),
    "window from the step that hides nothing": ({}, {"window": 9, "window_from": "step"}),
    "window from the step, steps see each other, documents": (
        {"num_anchors": 4, "steps": 4, "batch": 1},
        {"anchors": [5, 1, -1, 3], "window": 3, "window_from": "step", "causal": False, "key_start": [[4, 0, 0, 6]]},
    ),
    "softcap": ({}, {"softcap": 0.8}),
    "softcap, scale, window, padding": ({}, {"softcap": 2.0, "scale": -0.9, "window": 3, "key_start": [2, 0]}),
    "short values": ({"value_head": 3}, {}),
    "long values, anchors, S < T": (
        {"value_head": 12, "num_anchors": 3, "steps": 1, "thought_steps": 3},
        {"anchors": [4, -1, 4]},
    ),
    "everything at once": (
        {"length": 9, "num_anchors": 5, "steps": 3, "thought_steps": 5, "head": 6, "value_head": 10},
        {
            "anchors": [[8, 3, -1, 3, 5], [0, 7, 7, 2, -1]], "key_start": [[2, 0, 0, 3, 4], [0, 8, 1, 0, 0]],
            "thought_lengths": [[5, 4, 3, 2, 0], [3, 5, 5, 4, 4]], "window": 6, "window_from": "step", "causal": False,
            "scale": 0.6, "softcap": 1.5,
        },
    ),
}  # fmt: skip


_HEADS = {"batch": 1, "query_heads": 4, "kv_heads": 2}
_LATE = {"batch": 1, "query_heads": 4, "kv_heads": 1, "length": 400, "num_anchors": 12, "steps": 13}
# What fills the tiles of a GPU, in heads of models: loops over several blocks of keys and rows, with the loads of some
# in flight, masked and not.
GPU_CASES = {
    "D = 64, all positions": (_HEADS | {"length": 40, "steps": 4, "head": 64}, {}),
    "D = 128, all positions": (_HEADS | {"length": 40, "steps": 4, "head": 128}, {}),
    "D = 128, sampling step": (_HEADS | {"length": 70, "steps": 1, "thought_steps": 5, "head": 128}, {}),
    "D = 128, long thoughts": (_HEADS | {"length": 6, "steps": 4, "thought_steps": 40, "head": 128}, {}),
    "D = 64, blocks of keys": (_LATE | {"head": 64}, {"anchors": [388 + i for i in range(12)]}),
    "D = 128, blocks of keys": (_LATE | {"head": 128}, {"anchors": [388 + i for i in range(12)]}),
    "D = 128, blocks of keys, window, padding, inactive": (
        {"batch": 2, "query_heads": 4, "kv_heads": 2, "length": 300, "num_anchors": 10, "steps": 4, "head": 128},
        {"anchors": [299, -1, 150, 150, 3, 298, 7, 200, -1, 40], "window": 140, "key_start": [0, 37]},
    ),
    "D = 64, many blocks of rows": (
        {"batch": 1, "query_heads": 4, "kv_heads": 1, "length": 300, "num_anchors": 40, "steps": 4, "head": 64},
        {"anchors": [(5 + 37 * i) % 300 if i % 7 else -1 for i in range(40)], "window": 140, "key_start": [11]},
    ),
    "D = 128, decoding": (
        {"batch": 1, "query_heads": 8, "kv_heads": 2, "length": 300, "num_anchors": 1, "steps": 1, "thought_steps": 9,
         "head": 128},
        {"anchors": [299]},
    ),
}  # fmt: skip


def combination(seed):
    """A case with options drawn at random: any of them beside any other."""
    draw = random.Random(seed)
    length, steps, batch = draw.randint(1, 10), draw.randint(1, 4), draw.choice([1, 2])
    every = draw.random() < 0.3
    num_anchors, thought_steps = length if every else draw.randint(1, 7), steps + draw.randint(0, 3)
    query_heads, kv_heads = draw.choice([(4, 4), (4, 2), (4, 1), (2, 2)])

    def numbers(low, high, whole_batch=True):
        rows = [[draw.randint(low, high) for _ in range(num_anchors)] for _ in range(batch)]
        return rows[0] if whole_batch and draw.random() < 0.5 else rows

    options = {} if every else {"anchors": numbers(-1, length - 1)}
    possible = {
        "key_start": draw.choice([[draw.randint(0, length) for _ in range(batch)], numbers(0, length, False)]),
        "thought_lengths": numbers(0, thought_steps),
        "window": draw.randint(1, length + thought_steps),
        "causal": False,
        "scale": draw.choice([-1, 1]) * draw.uniform(0.1, 1.5),
        "softcap": draw.uniform(0.3, 5),
    }
    options |= {name: value for name, value in possible.items() if draw.random() < 0.5}
    if "window" in options:
        options["window_from"] = draw.choice(["anchor", "step"])
    shapes = {
        "batch": batch, "query_heads": query_heads, "kv_heads": kv_heads, "length": length, "num_anchors": num_anchors,
        "steps": steps, "thought_steps": thought_steps, "head": draw.randint(1, 9), "value_head": draw.randint(1, 9),
    }  # fmt: skip
    return shapes, options


CASES |= {f"combination {seed}": combination(seed) for seed in range(24)}


def case(name, dtype=torch.float32, device="cpu", cases=CASES):
    shapes, options = cases[name]
    tensors = {k: torch.tensor(v, device=device) for k, v in options.items() if isinstance(v, list)}
    return make_inputs(**shapes, dtype=dtype, device=device), options | tensors


def weighted_sum(output, lse, grad_output, grad_lse):
    """A scalar whose gradient reaches the output and the finite part of the lse."""
    return (output * grad_output).sum() + torch.where(lse.isfinite(), lse * grad_lse, 0).sum()
