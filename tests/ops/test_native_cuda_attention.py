"""The CUDA kernels of thought attention: on a GPU if there is one, else compiled for the CPU (tests/simt.py)."""

import pytest
import simt
import torch
from simt import DEVICE
from thought_attention_cases import CASES, case, make_inputs
from tolerances import assert_as_accurate

from quietstar.ops import thought_attention
from quietstar.ops.thought_attention import backend_torch
from quietstar.ops.thought_attention.inputs import Inputs, Mask, Result, ResultGradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Calls of more rows than a block has, of keys that are split over blocks, and of every head size that has a kernel.
LARGE = {
    "sampling step, repeated anchors": (
        {"batch": 1, "query_heads": 8, "length": 130, "num_anchors": 70, "steps": 1, "thought_steps": 7, "head": 128},
        {"anchors": [i // 2 + 90 for i in range(70)]},
    ),
    "sampling step, multi-head": (
        {"batch": 1, "query_heads": 2, "length": 150, "num_anchors": 40, "steps": 1, "thought_steps": 12, "head": 80},
        {"anchors": list(range(100, 140)), "window": 40},
    ),
    "unsorted anchors": (
        {"batch": 1, "length": 200, "num_anchors": 35, "steps": 1, "thought_steps": 3, "head": 16},
        {"anchors": [-1 if i % 5 == 0 else i * 37 % 200 for i in range(35)]},
    ),
    # Whole warps whose rows all see the first tile of keys but for its last, or its first.
    "a tile without its last key": (
        {"query_heads": 16, "kv_heads": 1, "length": 70, "num_anchors": 1, "steps": 1, "head": 8},
        {"anchors": [62]},
    ),
    "a tile without its first key": (
        {"query_heads": 16, "kv_heads": 1, "length": 70, "num_anchors": 1, "steps": 1, "head": 8},
        {"anchors": [69], "key_start": [1, 1]},
    ),
    # The first anchor lacks the first key of the first tile and the last of the fourth: the two between need no mask.
    "tiles that all rows see whole between others": (
        {"batch": 1, "query_heads": 16, "kv_heads": 1, "length": 510, "num_anchors": 2, "steps": 1, "head": 8},
        {"anchors": [254, 500], "key_start": [[1, 0]]},
    ),
    "decoding, split keys": (
        {"query_heads": 8, "length": 1100, "num_anchors": 3, "steps": 2, "thought_steps": 5, "head": 64},
        {"anchors": [[1099, 3, 350], [-1, 700, 1000]], "key_start": [0, 600]},
    ),
    # Documents end inside a tile of keys, a block of rows and a split.
    "sampling step, packed documents": (
        {"query_heads": 4, "length": 150, "num_anchors": 100, "steps": 1, "thought_steps": 4, "head": 64},
        {
            "anchors": list(range(50, 150)),
            "key_start": [[p // 70 * 70 for p in range(50, 150)], [(37 * p) % 151 for p in range(100)]],
        },
    ),
    "decoding, packed documents": (
        {"query_heads": 8, "length": 1100, "num_anchors": 3, "steps": 2, "thought_steps": 5, "head": 72},
        {"anchors": [[1099, 3, 350], [-1, 700, 1000]], "key_start": [[800, 4, 0], [5, 600, 100]], "window": 450},
    ),
    "decoding, long window": (
        {"query_heads": 4, "kv_heads": 1, "length": 900, "num_anchors": 4, "steps": 1, "thought_steps": 70, "head": 72},
        {"anchors": [899, 898, 897, 896], "window": 800},
    ),
    # Warps and blocks of rows of which none exists, tiles that only steps out of the window would see.
    "thought lengths, blocks of no rows": (
        {"batch": 1, "length": 150, "num_anchors": 100, "steps": 2, "thought_steps": 5, "head": 32},
        {
            "anchors": [i * 37 % 150 for i in range(100)],
            "thought_lengths": [0] * 70 + [5, 4, 3, 1, 0] * 6,
        },
    ),
    "window from the step, long thoughts, both ways": (
        {"batch": 1, "length": 90, "num_anchors": 2, "steps": 70, "thought_steps": 150, "head": 16},
        {"anchors": [89, 30], "window": 90, "window_from": "step", "causal": False, "thought_lengths": [150, 131]},
    ),
    "decoding, split keys, window from the step, softcap": (
        {"query_heads": 8, "length": 1100, "num_anchors": 3, "steps": 2, "thought_steps": 5, "head": 64},
        {
            "anchors": [[1099, 3, 350], [-1, 700, 1000]], "thought_lengths": [[5, 4, 5], [5, 5, 3]], "window": 600,
            "window_from": "step", "softcap": 1.5,
        },
    ),
    "drafted blocks, short keys, long values, softcap that hides little": (
        {"batch": 1, "length": 70, "num_anchors": 9, "steps": 8, "head": 40, "value_head": 128},
        {"anchors": [i * 8 for i in range(9)][::-1], "causal": False, "softcap": 50.0, "scale": 1.0},
    ),
    "long keys, values of odd size": (
        {"batch": 1, "length": 70, "num_anchors": 9, "steps": 1, "thought_steps": 3, "head": 72, "value_head": 63},
        {"anchors": [69, 60, 33, 0, 1, 2, 3, 4, 5]},
    ),
}  # fmt: skip
ALL_CASES = CASES | LARGE


@pytest.fixture(autouse=True)
def shim(monkeypatch, poisoned_memory):
    """The module that stands in for the GPU, or None."""
    return simt.use_cuda_kernels(monkeypatch)


def run(inputs, options, backend):
    with torch.no_grad():
        return thought_attention(*inputs, **options, return_lse=True, backend=backend)


def assert_right(inputs, options):
    dtype = inputs[0].dtype
    (output, lse), (eager, _) = run(inputs, options, "cuda"), run(inputs, options, "reference")
    # Products and sums of scores are those of float32 in every dtype, and the lse shows it.
    _, eager_lse = run([x.float() for x in inputs], options, "reference")
    true_output, true_lse = run([x.double() for x in inputs], options, "reference")
    assert output.dtype == dtype
    assert_as_accurate(output, eager, true_output, name="output")
    assert_as_accurate(lse, eager_lse, true_lse, name="lse")


@every_dtype
@pytest.mark.parametrize("name", ALL_CASES)
def test_output_and_lse(name, dtype):
    assert_right(*case(name, dtype, DEVICE, ALL_CASES))


@every_dtype
@pytest.mark.parametrize("head", [1, 8, 63, 65, 104, 128])
def test_head_sizes(head, dtype):
    assert_right(make_inputs(batch=1, length=70, steps=1, thought_steps=2, head=head, dtype=dtype, device=DEVICE), {})


@every_dtype
@pytest.mark.parametrize("layout", ["heads behind positions", "columns apart", "begins anywhere"])
def test_strides(layout, dtype):
    inputs, options = case("sampling step, multi-head", dtype, DEVICE, LARGE)
    expected = run(inputs, options, "cuda")
    if layout == "heads behind positions":  # as transformers gives them
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    elif layout == "columns apart":
        strided = [torch.stack([x, x], dim=-1)[..., 0] for x in inputs]
    else:
        strided = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in inputs]
    for a, b in zip(run(strided, options, "cuda"), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_anchors_of_any_layout(index_dtype):
    inputs, options = case("anchors per batch", device=DEVICE)
    expected = run(inputs, options, "cuda")
    anchors = options["anchors"].to(index_dtype)
    apart = torch.stack([anchors, anchors], dim=-1)[..., 0]
    expanded = anchors[:1].expand(2, -1)
    for a, b in zip(run(inputs, {"anchors": apart}, "cuda"), expected, strict=True):
        assert torch.equal(a, b)
    same = run(inputs, {"anchors": expanded}, "cuda"), run(inputs, {"anchors": anchors[0]}, "cuda")
    for a, b in zip(*same, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", [{"num_anchors": 0}, {"length": 0, "num_anchors": 2}, {"batch": 0}])
def test_empty(sizes):
    inputs = make_inputs(**sizes, dtype=torch.bfloat16, device=DEVICE)
    anchors = torch.full((inputs[0].shape[2],), -1, device=DEVICE)
    output, lse = run(inputs, {"anchors": anchors}, "cuda")
    assert output.shape == inputs[0].shape
    assert not output.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scale_of_any_sign(scale):
    inputs, _ = case("all positions", torch.float16, DEVICE)
    assert_right(inputs, {"scale": scale})


@every_dtype
@pytest.mark.parametrize("window", [None, 300], ids=["all in front", "windows with keys between them"])
def test_hidden_keys_may_hold_anything(window, dtype):
    """What no row sees, what belongs to no anchor and what lies between rows is not read into any result."""
    inputs, options = case("decoding, split keys", dtype, DEVICE, LARGE)
    inputs = [x.detach() for x in inputs]
    anchors = torch.tensor([[700, 3, 350], [-1, 700, 650]], device=DEVICE)
    # In the second batch there are tiles that all anchors see whole, but for the one that is none.
    options = {"anchors": anchors, "key_start": torch.tensor([0, 200], device=DEVICE), "window": window}
    expected = run(inputs, options, "cuda")
    distance = anchors[:, :, None] - torch.arange(1100, device=DEVICE)
    keys = ((distance < 0) | (distance >= (window or 1100))).all(1)[:, None, :, None]
    idle = (anchors < 0)[:, None, :, None, None]
    spoiled = [x.masked_fill(keys if x.dim() == 4 else idle, float("nan")) for x in inputs]
    wider = [torch.cat([x, torch.full_like(x, float("nan"))], dim=-1)[..., : x.shape[-1]] for x in spoiled]
    for a, b in zip(run(wider, options, "cuda"), expected, strict=True):
        assert torch.equal(a, b)


def test_splits_are_added_up_in_a_fixed_order(shim):
    inputs, options = case("decoding, split keys", torch.bfloat16, DEVICE, LARGE)
    expected = run(inputs, options, "cuda")
    for seed in range(1, 4):
        if shim is not None:
            shim.set_random_seed(seed)
        for a, b in zip(run(inputs, options, "cuda"), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["window, padding, anchors", "softcap", "unsorted, repeated, inactive"])
def test_gradients_are_those_of_another_backend(name, dtype, compiled):
    """Of torch, to the bit, given the output and the lse of these kernels."""
    inputs, options = case(name, dtype, DEVICE)
    leaves = [x.detach().requires_grad_() for x in inputs]
    call = torch.compile(thought_attention, fullgraph=True, backend="aot_eager") if compiled else thought_attention
    output, lse = call(*leaves, **options, return_lse=True, backend="cuda,torch")
    for a, b in zip((output, lse), run(inputs, options, "cuda"), strict=True):
        assert torch.equal(a, b)
    grads = [torch.randn(x.shape, device=DEVICE).to(x.dtype) for x in (output, lse)]
    mask = Mask.of(Inputs(*leaves), **options)
    result = Result(output.detach(), lse.detach())
    expected = backend_torch.backward(ResultGradients(*grads), Inputs(*(x.detach() for x in inputs)), mask, result)
    for grad, same in zip(torch.autograd.grad((output, lse), leaves, grads), expected, strict=True):
        assert torch.equal(grad, same)


@pytest.mark.parametrize("wanted", [(0,), (1, 4), (2, 3)])
def test_gradients_of_some_inputs_alone(wanted):
    inputs, options = case("window, padding, anchors", device=DEVICE)

    def grads(backend):
        leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        thought_attention(*leaves, **options, backend=backend).square().sum().backward()
        assert [x.grad is not None for x in leaves] == [i in wanted for i in range(5)]
        return [leaves[i].grad for i in wanted]

    for grad, expected in zip(grads("cuda"), grads("reference"), strict=True):
        torch.testing.assert_close(grad, expected, atol=2e-5, rtol=2e-5)


def test_who_else_can():
    with torch.no_grad(), pytest.raises(ValueError, match=r"heads of at most 128 elements, got D = 129; usable here"):
        thought_attention(*make_inputs(head=129, device=DEVICE), backend="cuda")
    with torch.no_grad(), pytest.raises(ValueError, match=r"heads of at most 128 elements, got Dv = 129; usable here"):
        thought_attention(*make_inputs(value_head=129, device=DEVICE), backend="cuda")
