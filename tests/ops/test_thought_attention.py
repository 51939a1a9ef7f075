"""Thought attention: every backend against a float64 oracle that gathers each row's visible keys one by one."""

import math
import re

import pytest
import torch
from backends import ALL, with_dtypes
from thought_attention_cases import CASES, INPUTS, case, make_inputs, weighted_sum

from quietstar.ops import thought_attention
from quietstar.ops.thought_attention import backend_torch
from quietstar.ops.thought_attention.inputs import Inputs, Mask

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def oracle(inputs, anchors=None, key_start=None, thought_lengths=None, window=None, window_from="anchor", causal=True,
           scale=None, softcap=None):  # fmt: skip
    """Output and lse in float64, row by row."""
    query, key, value, thought_key, thought_value = (x.double() for x in inputs)
    batch, query_heads, num_anchors, steps, head_size = query.shape
    group = query_heads // key.shape[1]
    thought_steps = thought_key.shape[3]
    anchors = torch.arange(key.shape[2]) if anchors is None else anchors
    anchors = anchors.expand(batch, -1)
    starts = torch.zeros(batch, 1, dtype=torch.int64) if key_start is None else key_start.view(batch, -1)
    starts = starts.expand(anchors.shape).tolist()
    lengths = torch.tensor(thought_steps) if thought_lengths is None else thought_lengths
    lengths = lengths.expand(batch, num_anchors).tolist()
    reach = math.inf if window is None else window
    scale = head_size**-0.5 if scale is None else scale
    outputs, lses = [], []
    for b in range(batch):
        for h in range(query_heads):
            for p, a in enumerate(anchors[b].tolist()):
                for s in range(steps):
                    step = thought_steps - steps + s
                    if a < 0 or step >= lengths[b][p]:
                        outputs.append(0 * value[b, h // group, 0])
                        lses.append(torch.tensor(-math.inf, dtype=torch.float64))
                        continue
                    place = a + 1 + step if window_from == "step" else a
                    base = [j for j in range(starts[b][p], a + 1) if place - j < reach]
                    own = range(min(step + 1, lengths[b][p]) if causal else lengths[b][p])
                    own = [t for t in own if window_from == "anchor" or step - t < reach]
                    keys = torch.cat([key[b, h // group, base], thought_key[b, h // group, p, own]])
                    values = torch.cat([value[b, h // group, base], thought_value[b, h // group, p, own]])
                    scores = keys @ query[b, h, p, s] * scale
                    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
                    outputs.append(scores.softmax(0) @ values)
                    lses.append(scores.logsumexp(0))
    return torch.stack(outputs).view(*query.shape[:-1], -1), torch.stack(lses).view(query.shape[:-1])


@pytest.mark.parametrize("through_lse", [False, True], ids=["output", "output and lse"])
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, backend, through_lse):
    inputs, options = case(name)
    expected = oracle(inputs, **options)
    grad_output = torch.randn(expected[0].shape)
    grad_lse = torch.randn(expected[1].shape) * through_lse
    wanted = torch.autograd.grad(weighted_sum(*expected, grad_output, grad_lse), inputs, allow_unused=True)

    output, lse = thought_attention(*inputs, **options, return_lse=True, backend=backend)
    loss = weighted_sum(output, lse, grad_output, grad_lse) if through_lse else (output * grad_output).sum()
    grads = torch.autograd.grad(loss, inputs)

    torch.testing.assert_close(output.double(), expected[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(lse.double(), expected[1], atol=2e-5, rtol=0)
    for label, grad, want, given in zip(INPUTS, grads, wanted, inputs, strict=True):
        want = torch.zeros_like(given) if want is None else want
        torch.testing.assert_close(grad, want, atol=2e-5, rtol=0, msg=lambda m, label=label: f"{label}: {m}")


@pytest.mark.parametrize("score_bytes", [1, 4 * 2 * 4 * 3 * 6 * 2])
@pytest.mark.parametrize("name", ["window", "left padding", "unsorted, repeated, inactive", "documents, window, S < T"])
def test_blocks_of_anchors_change_nothing(name, score_bytes, monkeypatch, default_backend):
    inputs, options = case(name)
    whole = thought_attention(*inputs, **options, return_lse=True, backend=default_backend)
    monkeypatch.setattr(backend_torch, "SCORE_BYTES", score_bytes)
    blocked = thought_attention(*inputs, **options, return_lse=True, backend=default_backend)
    torch.testing.assert_close(blocked, whole)
    grads = [torch.autograd.grad(x[0].sum() + x[1][x[1].isfinite()].sum(), inputs) for x in (whole, blocked)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["all positions", "unsorted, repeated, inactive"])
@pytest.mark.parametrize(("backend", "dtype"), with_dtypes([torch.bfloat16, torch.float16], ["torch", "cpu"]))
def test_half_precision_is_as_accurate_as_eager(backend, dtype, name):
    inputs, options = case(name)
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    grad = torch.randn(inputs[0].shape)
    expected = oracle(inputs, **options)[0]
    wanted = torch.autograd.grad((expected * grad).sum(), inputs)
    errors = []
    for each in (backend, "reference"):
        output = thought_attention(*inputs, **options, backend=each)
        grads = torch.autograd.grad((output * grad).sum(), inputs)
        assert {x.dtype for x in (output, *grads)} == {dtype}
        errors.append(
            [(x.double() - y.double()).abs().max() for x, y in zip([output, *grads], [expected, *wanted], strict=True)]
        )
    for ours, eager in zip(*errors, strict=True):
        assert ours <= 1.5 * eager + torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", ["all positions", "window, padding, anchors"])
def test_strided_inputs_and_expanded_gradients(name, backend):
    """Inputs as transformers gives them (heads behind positions), a gradient of stride 0 from sum()."""
    inputs, options = case(name)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    assert not strided[0].is_contiguous()
    results = []
    for given in (inputs, strided):
        output = thought_attention(*given, **options, backend=backend)
        results.append((output, *torch.autograd.grad(output.sum(), given)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("wanted", INPUTS)
def test_each_input_alone_can_need_a_gradient(wanted, default_backend):
    inputs, options = case("all positions")
    full = torch.autograd.grad(thought_attention(*inputs, **options, backend=default_backend).square().sum(), inputs)
    index = INPUTS.index(wanted)
    alone = [x.detach() for x in inputs]
    alone[index].requires_grad_()
    thought_attention(*alone, **options, backend=default_backend).square().sum().backward()
    torch.testing.assert_close(alone[index].grad, full[index], atol=0, rtol=0)
    assert all(x.grad is None for i, x in enumerate(alone) if i != index)


def test_gradients_are_bitwise_reproducible(default_backend):
    inputs, options = case("repeated anchors")
    runs = []
    for _ in range(2):
        output = thought_attention(*inputs, **options, backend=default_backend)
        runs.append(torch.autograd.grad(output.square().sum(), inputs))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_second_backward_through_a_retained_graph(default_backend):
    inputs, _ = case("all positions")
    output = thought_attention(*inputs, backend=default_backend).square().sum()
    first = torch.autograd.grad(output, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(output, inputs), first, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["all positions", "window, padding, anchors", "documents, window, S < T"])
def test_opcheck(name, default_backend):
    inputs, options = case(name)
    inputs = [x.detach() for x in inputs]
    mask = *Mask.of(Inputs(*inputs), **options), default_backend
    output, lse = torch.ops.quietstar.thought_attention(*inputs, *mask)
    torch.library.opcheck(torch.ops.quietstar.thought_attention, (*inputs, *mask))
    grads = (torch.randn_like(output), torch.randn_like(lse), *inputs, output, lse, *mask)
    torch.library.opcheck(torch.ops.quietstar.thought_attention_backward, grads)


@pytest.mark.parametrize("name", ["window, padding, anchors", "documents, window, S < T"])
@pytest.mark.parametrize("backend", ALL)
def test_compiles_without_graph_breaks(backend, name):
    inputs, options = case(name)

    def loss(*tensors):
        return thought_attention(*tensors, **options, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs)
    )


def test_autocast_takes_mixed_inputs():
    inputs, _ = case("all positions")
    mixed = [inputs[0].to(torch.bfloat16), *inputs[1:]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = thought_attention(*mixed)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), thought_attention(*inputs), atol=0.05, rtol=0.05)


def change(**changes):
    return lambda arguments: arguments | changes


BAD_INPUT = {
    "not a tensor": (change(key=[1.0]), TypeError, "key must be a torch.Tensor, got list"),
    "rank": (change(query=torch.zeros(2, 4, 6, 8)), ValueError, "query must have shape [B, Hq, P, S, D]"),
    "head size": (change(key=torch.zeros(2, 2, 6, 9)), ValueError, "with D = 8 as in query, got [2, 2, 6, 9]"),
    "values of another head size": (
        change(thought_value=torch.zeros(2, 2, 6, 3, 9)), ValueError, "with Dv = 8 as in value, got [2, 2, 6, 3, 9]",
    ),
    "values of another length": (change(value=torch.zeros(2, 2, 5, 8)), ValueError, "with L = 6 as in key"),
    "no element in a value": (
        change(value=torch.zeros(2, 2, 6, 0), thought_value=torch.zeros(2, 2, 6, 3, 0)), ValueError,
        "value must have heads of at least Dv = 1 element, got Dv = 0",
    ),
    "heads": (
        change(query=torch.zeros(2, 3, 6, 3, 8)), ValueError,
        "query must have Hq a multiple of Hkv = 2 heads of key, got Hq = 3",
    ),
    "T < S": (
        change(thought_key=torch.zeros(2, 2, 6, 2, 8), thought_value=torch.zeros(2, 2, 6, 2, 8)), ValueError,
        "thought_key must have T >= S = 3",
    ),
    "anchor too large": (change(anchors=torch.arange(1, 7)), ValueError, "anchors must be in [-1, 5], got values"),
    "anchor too small": (change(anchors=torch.arange(-2, 4)), ValueError, "anchors must be in [-1, 5], got values"),
    "anchors not integer": (change(anchors=torch.zeros(6)), TypeError, "anchors must be int32 or int64"),
    "anchors shape": (change(anchors=torch.zeros(5, dtype=torch.int64)), ValueError, "anchors must have shape [P]"),
    "anchors needed": (change(key=torch.zeros(2, 2, 7, 8), value=torch.zeros(2, 2, 7, 8)), ValueError, "anchors must"),
    "key_start's rank": (
        change(key_start=torch.zeros(2, 6, 1, dtype=torch.int64)), ValueError,
        "key_start must have shape [B] or [B, P], got 3 dimensions",
    ),
    "key_start of a number": (
        change(key_start=torch.tensor(0)), ValueError, "key_start must have shape [B] or [B, P], got 0 dimensions",
    ),
    "key_start for too few anchors": (
        change(key_start=torch.zeros(2, 5, dtype=torch.int64)), ValueError,
        "key_start must have shape [B] or [B, P] with P = 6 as in query, got [2, 5]",
    ),
    "key_start for one batch": (
        change(key_start=torch.zeros(1, 6, dtype=torch.int64)), ValueError,
        "key_start must have shape [B] or [B, P] with B = 2 as in query, got [1, 6]",
    ),
    "key_start not integer": (change(key_start=torch.zeros(2, 6)), TypeError, "key_start must be int32 or int64"),
    "padding too long for an anchor": (
        change(key_start=torch.tensor([[0] * 6, [7] * 6])), ValueError, "key_start must be in [0, 6], got values",
    ),
    "padding too long": (change(key_start=torch.tensor([0, 7])), ValueError, "key_start must be in [0, 6]"),
    "dtype": (change(thought_value=torch.zeros(2, 2, 6, 3, 8).half()), TypeError, "thought_value must have the dtype"),
    "integer query": (change(query=torch.zeros(2, 4, 6, 3, 8).long()), TypeError, "query must be float16"),
    "device": (change(key=torch.zeros(2, 2, 6, 8, device="meta")), ValueError, "key must be on the device of query"),
    "thought too long": (
        change(thought_lengths=torch.tensor([0, 1, 2, 3, 4, 0])), ValueError, "thought_lengths must be in [0, 3], got",
    ),
    "negative thought length": (
        change(thought_lengths=torch.full((2, 6), -1)), ValueError, "thought_lengths must be in [0, 3], got values",
    ),
    "thought_lengths not integer": (
        change(thought_lengths=torch.ones(6)), TypeError, "thought_lengths must be int32 or int64, got torch.float32",
    ),
    "thought_lengths of the batch": (
        change(thought_lengths=torch.ones(2, dtype=torch.int64)), ValueError,
        "thought_lengths must have shape [P] or [B, P] with P = 6",
    ),
    "thought_lengths on another device": (
        change(thought_lengths=torch.ones(6, dtype=torch.int64, device="meta")), ValueError,
        "thought_lengths must be on the device of query",
    ),
    "causal": (change(causal=1), TypeError, "causal must be a bool, got int"),
    "causal as a mask": (change(causal=torch.ones(3, 3)), TypeError, "causal must be a bool, got Tensor"),
    "softcap of 0": (change(softcap=0.0), ValueError, "softcap must be None or positive, got 0.0"),
    "negative softcap": (change(softcap=-30), ValueError, "softcap must be None or positive, got -30"),
    "softcap not finite": (change(softcap=math.inf), ValueError, "softcap must be finite in torch.float32, got inf"),
    "softcap not a number": (change(softcap="30"), TypeError, "softcap must be None or a number, got str"),
    "window_from": (change(window_from="base"), ValueError, "window_from must be one of 'anchor', 'step', got 'base'"),
    "window": (change(window=0), ValueError, "window must be None or an integer >= 1, got 0"),
    "unknown backend": (change(backend="fast"), ValueError, "backend must be None, 'auto' or one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named(name):
    spoil, error, message = BAD_INPUT[name]
    arguments = dict(zip(INPUTS, make_inputs(), strict=True))
    with pytest.raises(error, match=re.escape(message)):
        thought_attention(**spoil(arguments))


def test_unknown_default_backend_names_the_variable(monkeypatch):
    monkeypatch.setenv("QUIETSTAR_BACKEND", "fast")
    with pytest.raises(ValueError, match="QUIETSTAR_BACKEND"):
        thought_attention(*make_inputs())
