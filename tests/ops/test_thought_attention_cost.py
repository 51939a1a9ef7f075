"""The cost of a call of thought attention, against a count of what the specification's mask lets through."""

import pytest
import torch
from thought_attention_cases import CASES, case, make_inputs

from quietstar.ops import thought_attention
from quietstar.ops.thought_attention.cost import thought_attention_cost
from quietstar.ops.thought_attention.inputs import Inputs, Mask
from quietstar.ops.thought_attention.reference import visibility


@pytest.mark.parametrize("name", CASES)
def test_counts_what_the_mask_lets_through(name):
    inputs, options = case(name)
    inputs = Inputs(*inputs)
    batch, query_heads, num_anchors, steps, head_size = inputs.query.shape
    kv_heads, value_size = inputs.key.shape[1], inputs.value.shape[3]
    visible = visibility(inputs, Mask.of(inputs, **options)).expand(batch, -1, -1, -1)
    options = {name: value for name, value in options.items() if name not in ("scale", "softcap")}
    forward, backward = thought_attention_cost(*inputs, **options)

    pairs = query_heads * int(visible.sum())
    assert forward.flops == (2 * head_size + 2 * value_size) * pairs
    assert backward.flops == (6 * head_size + 4 * value_size) * pairs
    query, output = 4 * head_size, 4 * value_size
    both = query + output
    rows = query_heads * int(visible.any(3).sum())
    all_rows = batch * query_heads * num_anchors * steps
    keys = kv_heads * int(visible.any((1, 2)).sum())
    all_keys = batch * kv_heads * visible.shape[3]
    assert forward.bytes == rows * query + keys * both + all_rows * (output + 4)
    assert backward.bytes == rows * (both + output + 4) + (keys + all_keys) * both + all_rows * query


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_bytes_are_those_of_the_tensors_where_everything_is_seen(dtype):
    inputs = make_inputs(dtype=dtype)
    output, lse = thought_attention(*inputs, return_lse=True, backend="reference")
    forward, backward = thought_attention_cost(*(x.to("meta") for x in inputs))
    given, made = sum(x.nbytes for x in inputs), output.nbytes + lse.nbytes
    assert forward.bytes == given + made
    assert backward.bytes == given + made + output.nbytes + given
