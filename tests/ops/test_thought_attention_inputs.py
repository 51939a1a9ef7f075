"""Inputs of any layout, size and scale: every backend gives what the specification gives."""

import itertools
import math
import re

import pytest
import torch
from backends import ALL, FAST
from thought_attention_cases import INPUTS, case, make_inputs, weighted_sum

from quietstar.ops import thought_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(inputs, options, backend, grad=None, dtype=None):
    """Output, lse and gradients through the output."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    output, lse = thought_attention(*leaves, **options, return_lse=True, backend=backend)
    grad = torch.ones_like(output) if grad is None else grad.to(output.dtype)
    return output, lse, *torch.autograd.grad(output, leaves, grad)


def assert_specified(inputs, options, backend, grad=None, tolerance=2e-5):
    """Errors count in units of each result's largest element."""
    expected = run(inputs, options, "reference", grad, torch.float64)
    for actual, want in zip(run(inputs, options, backend, grad), expected, strict=True):
        largest = want.masked_fill(want == -math.inf, 0).abs().max().item()
        torch.testing.assert_close(actual.double(), want, atol=tolerance * max(largest, 1e-30), rtol=0)


LAYOUTS = {
    "elements behind the dimension before": lambda x: x.mT.contiguous().mT,
    "elements in front": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "every second element": lambda x: torch.stack([x, torch.full_like(x, math.nan)], dim=-1)[..., 0],
    "one element for all": lambda x: x[..., :1].expand(x.shape),
    "one vector for all": lambda x: x[..., :1, :].expand(x.shape),
    "one anchor or position for all": lambda x: x[:, :, :1].expand(x.shape),
    "one head for all": lambda x: x[:, :1].expand(x.shape),
    "all the same": lambda x: x.flatten()[0].expand(x.shape),
    "vectors overlap": lambda x: x.flatten().as_strided(x.shape, [*range(2, x.dim() + 1), 1]),
    "dimensions the other way round": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(
        *reversed(range(x.dim()))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["all positions", "window, padding, anchors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs_and_gradients(layout, name, every_backend, device):
    inputs, options = case(name, device=device)
    inputs = [LAYOUTS[layout](x.detach()) for x in inputs]
    assert_specified(inputs, options, every_backend, LAYOUTS[layout](torch.randn(inputs[0].shape, device=device)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["elements behind the dimension before", "vectors overlap"])
@pytest.mark.parametrize("which", [*INPUTS, "gradient"])
def test_one_layout_alone(which, layout, dtype):
    """In the dtypes and sizes in which the library's kernel has ways of its own."""
    tensors = make_inputs(batch=1, length=70, steps=1, head=64, dtype=dtype)
    tensors = [x.detach() for x in (*tensors, torch.randn_like(tensors[0]))]
    place = [*INPUTS, "gradient"].index(which)
    tensors[place] = LAYOUTS[layout](tensors[place])
    *inputs, grad = tensors
    tolerance = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    assert_specified(inputs, {}, "torch", grad, tolerance)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: torch.stack([x, torch.full_like(x, 10**6)], dim=-1)[..., 0],
        lambda x: x.mT.contiguous().mT,
        lambda x: x[:1].expand(x.shape),
        lambda x: x[..., :1].expand(x.shape),
    ],
    ids=["every second element", "batches side by side", "one batch for all", "one element for all"],
)
@pytest.mark.parametrize("per_anchor", [False, True], ids=["a start for each batch", "a start for each anchor"])
def test_layouts_of_indices(per_anchor, layout, index_dtype, every_backend, device):
    options = {
        "anchors": torch.tensor([[5, -1, 2], [0, 4, 4]], dtype=index_dtype, device=device),
        "key_start": torch.tensor([[1, 4, 0], [3, 0, 5]], dtype=index_dtype, device=device),
    }
    inputs = make_inputs(num_anchors=3, steps=12, device=device)  # more rows than a tile
    strided = {name: layout(x) for name, x in options.items()}
    if not per_anchor:
        strided["key_start"] = layout(options["key_start"][:, :1])[:, 0]
    plain = {name: x.contiguous() for name, x in strided.items()}
    expected = run(inputs, plain, every_backend)
    for actual, want in zip(run(inputs, strided, every_backend), expected, strict=True):
        assert torch.equal(actual, want)


@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-30, -0.0, 1, 3.0])
@pytest.mark.parametrize("name", ["all positions", "window, padding, anchors"])
def test_scales(name, scale, every_backend, device):
    inputs, options = case(name, device=device)
    assert_specified(inputs, options | {"scale": scale}, every_backend)


@pytest.mark.parametrize("scale", [2e-5, -2e-5])
@pytest.mark.parametrize("name", ["all positions", "window, padding, anchors"])
def test_scores_beyond_half_precision(name, scale, every_backend, device):
    """Scores of half a million, where float16 ends at 65504, and a scale that brings their gradients near its least."""
    if every_backend == "cpu":
        pytest.skip("it takes no float16")
    inputs, options = case(name, torch.float16, device)
    inputs = [x * 250 if name.endswith("y") else x for name, x in zip(INPUTS, inputs, strict=True)]
    assert_specified(inputs, options | {"scale": scale}, every_backend, tolerance=2e-3)


@pytest.mark.parametrize("name", ["all positions", "window, padding, anchors"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_of_probabilities_beyond_half_precision(backend, name):
    """Those of scores, which fused kernels round to float16 in order to multiply them, are within it."""
    inputs, options = case(name, torch.float16)
    inputs = [x * 200 if name.endswith("value") else x / 2 for name, x in zip(INPUTS, inputs, strict=True)]
    assert_specified(inputs, options | {"scale": 0.01}, backend, torch.randn(inputs[0].shape) * 500, tolerance=2e-3)


EMPTY = {
    "S": {"steps": 0, "thought_steps": 2},
    "T": {"steps": 0},
    "P": {"num_anchors": 0},
    "L": {"num_anchors": 2, "length": 0},
    "L and P": {"length": 0},
    "B": {"batch": 0},
    "Hq": {"query_heads": 0},
    "all heads": {"query_heads": 0, "kv_heads": 0},
}


@pytest.mark.parametrize("sizes", EMPTY.values(), ids=EMPTY)
def test_nothing_to_do(sizes, every_backend, device):
    inputs = make_inputs(**sizes, device=device)
    anchors = torch.full((inputs[0].shape[2],), -1, device=device)
    output, lse, *gradients = run(inputs, {"anchors": anchors}, every_backend)
    assert output.shape == inputs[0].shape
    assert lse.shape == inputs[0].shape[:-1]
    assert not output.any()
    assert (lse == -math.inf).all()
    for gradient, given in zip(gradients, inputs, strict=False):
        assert gradient.shape == given.shape
        assert not gradient.any()


@pytest.mark.parametrize("name", ["all positions", "window, padding, anchors"])
@pytest.mark.parametrize("backend", ALL)
def test_autocast_chooses_the_dtype_of_inputs_and_no_other(backend, name):
    """Inside, forward and backward, an op computes as it does with bfloat16 inputs outside."""
    inputs, options = case(name)
    narrow = [x.to(torch.bfloat16) for x in inputs]
    grad = torch.randn(inputs[0].shape)

    def solve(given):
        return thought_attention(*given, **options, return_lse=True, backend=backend)

    expected = solve(narrow)
    expected += torch.autograd.grad(weighted_sum(*expected, grad, 1.0), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = solve(inputs)
        if backend != "reference":  # whose backward is PyTorch's own, which follows autocast
            results += torch.autograd.grad(weighted_sum(*results, grad, 1.0), inputs)
    for actual, want in zip(results, expected, strict=False):
        assert torch.equal(actual, want)


@pytest.mark.parametrize("part", ["output", "lse", "both"])
@pytest.mark.parametrize("backend", [*FAST, "triton"])
def test_a_second_derivative_is_refused(backend, part):
    inputs, _ = case("all positions")
    output, lse = thought_attention(*inputs, return_lse=True, backend=backend)
    loss = {"output": output.sum(), "lse": lse.square().sum(), "both": output.sum() + lse.sum()}[part]
    gradients = torch.autograd.grad(loss, inputs[:2], create_graph=True)
    for actual, want in zip(gradients, torch.autograd.grad(loss, inputs[:2], retain_graph=True), strict=True):
        assert torch.equal(actual, want)
    for gradient, given in itertools.product(gradients, inputs[:2]):
        with pytest.raises(RuntimeError, match=r"ThoughtAttention\..* is not differentiable"):
            torch.autograd.grad(gradient.square().sum(), given, retain_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="is not differentiable"):  # a penalty is not left out either
        (loss + gradients[0].square().sum()).backward()


def test_the_specification_has_a_second_derivative():
    inputs = make_inputs(batch=1, query_heads=1, kv_heads=1, length=3, steps=2, head=2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda *x: thought_attention(*x, backend="reference"), inputs)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (math.nan, ValueError, "scale must be finite in torch.float32, got nan"),
        (-math.inf, ValueError, "scale must be finite in torch.float32, got -inf"),
        (1e39, ValueError, "scale must be finite in torch.float32, got 1e+39"),
        ("0.5", TypeError, "scale must be None or a number, got str"),
        (torch.tensor(0.5), TypeError, "scale must be None or a number, got Tensor"),
        (True, TypeError, "scale must be None or a number, got bool"),
    ],
)
def test_bad_scales_are_named(scale, error, message):
    with pytest.raises(error, match=re.escape(message)):
        thought_attention(*make_inputs(), scale=scale)


def test_heads_without_elements_are_refused():
    with pytest.raises(ValueError, match="query must have heads of at least D = 1 element, got D = 0"):
        thought_attention(*make_inputs(head=0))
