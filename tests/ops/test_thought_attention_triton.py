"""The Triton kernels of thought attention against the specification: on a GPU if there is one, else interpreted."""

import collections
import itertools
import math
import mmap
from functools import partial

import pytest
import torch
from backends import with_triton_dtypes
from thought_attention_cases import CASES, GPU_CASES, INPUTS, case, make_inputs, weighted_sum
from tolerances import assert_as_accurate

from quietstar.ops import thought_attention
from quietstar.ops._availability import interpreted

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

from quietstar.ops.thought_attention import (  # noqa: E402 (import triton)
    backend_triton,
    triton_backward_key,
    triton_backward_query,
    triton_forward,
    triton_launch,
)
from quietstar.ops.thought_attention.inputs import Inputs, Mask  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = "output", "lse", *(f"d_{name}" for name in INPUTS)


def spread(count, length):
    """Anchors over the whole sequence, not sorted."""
    return [(7 + 31 * i) % length for i in range(count)]


def documents(count, length, size):
    """Where those of "spread" anchors start: of "size" tokens in the first batch, half as long in the second."""
    return [[anchor // each * each for anchor in spread(count, length)] for each in (size, size // 2)]


# Tiles of the interpreter are 64 rows and 32 keys, edges 32 and 16: what does not fit one of them, and odd sizes.
LARGE = {
    "full blocks": ({"length": 100, "num_anchors": 12, "batch": 1}, {"anchors": spread(12, 100)}),
    "window over blocks": (
        {"length": 130, "num_anchors": 40, "batch": 1}, {"anchors": spread(40, 130), "window": 90},
    ),
    "padding and window over blocks": (
        {"length": 100, "num_anchors": 12}, {"anchors": spread(12, 100), "window": 70, "key_start": [0, 37]},
    ),
    "documents over blocks": (
        {"length": 130, "num_anchors": 24}, {"anchors": spread(24, 130), "key_start": documents(24, 130, 110)},
    ),
    "documents and window over blocks": (
        {"length": 130, "num_anchors": 24},
        {"anchors": spread(24, 130), "window": 70, "key_start": documents(24, 130, 90)},
    ),
    "documents of any order, inactive anchors": (
        {"length": 120, "num_anchors": 24},
        {"anchors": [a if a % 5 else -1 for a in spread(24, 120)], "key_start": [spread(24, 110), spread(24, 9)]},
    ),
    "an anchor larger than a tile": (
        {"length": 3, "steps": 40, "thought_steps": 45, "query_heads": 2, "kv_heads": 1, "batch": 1}, {},
    ),
    "T = 130": ({"length": 3, "steps": 2, "thought_steps": 130, "batch": 1}, {}),
    "sampling step, many anchors": ({"length": 40, "steps": 1, "thought_steps": 12, "batch": 1}, {}),
    "sampling step, rows that see nothing of the first blocks, or no base key": (
        {"length": 130, "num_anchors": 40, "steps": 1, "thought_steps": 12},
        {"anchors": spread(40, 130), "key_start": [spread(40, 125), documents(40, 130, 64)[0]]},
    ),
    "all positions, window and padding over blocks": (
        {"length": 100, "steps": 2, "query_heads": 2, "kv_heads": 1}, {"window": 45, "key_start": [0, 37]},
    ),
    "all positions, documents over blocks": (
        {"length": 100, "steps": 2, "query_heads": 2, "kv_heads": 1, "batch": 1},
        {"key_start": [[i // 40 * 40 for i in range(100)]]},
    ),
    "group of 7": ({"length": 9, "query_heads": 7, "kv_heads": 1, "batch": 1}, {}),
    "D = 16": ({"length": 3, "head": 16, "batch": 1}, {}),
    "D = 80": ({"length": 3, "head": 80, "batch": 1}, {}),
    "D = 96": ({"length": 3, "head": 96, "batch": 1}, {}),
    "D = 256": ({"length": 2, "head": 256, "batch": 1, "query_heads": 2}, {}),
    "steps that see each other, S < T": (
        {"length": 40, "num_anchors": 12, "steps": 5, "thought_steps": 45, "batch": 1},
        {"anchors": spread(12, 40), "causal": False},
    ),
    "thought lengths, an anchor larger than a tile": (
        {"length": 70, "num_anchors": 3, "steps": 90, "query_heads": 2, "kv_heads": 1},
        {"anchors": [60, 69, 5], "thought_lengths": [[70, 0, 90], [2, 40, 33]]},
    ),
    "thought lengths, an anchor larger than a tile, steps see each other, S < T": (
        {"length": 9, "num_anchors": 3, "steps": 70, "thought_steps": 90, "batch": 1, "query_heads": 1, "kv_heads": 1},
        {"anchors": [8, 8, 3], "thought_lengths": [50, 20, 90], "causal": False},
    ),
    "thought lengths, documents of any order": (
        {"length": 120, "num_anchors": 24},
        {
            "anchors": [a if a % 5 else -1 for a in spread(24, 120)], "key_start": [spread(24, 110), spread(24, 9)],
            "thought_lengths": [[i % 4 for i in range(24)], [i % 3 for i in range(24)]],
        },
    ),
    "thought lengths, window": (
        {"length": 130, "num_anchors": 24},
        {"anchors": spread(24, 130), "window": 90, "thought_lengths": [i % 4 for i in range(24)]},
    ),
    "window from the step over blocks": (
        {"length": 130, "num_anchors": 40, "steps": 2, "thought_steps": 9, "batch": 1},
        {"anchors": spread(40, 130), "window": 90, "window_from": "step"},
    ),
    "window from the step over own steps": (
        {"length": 20, "num_anchors": 2, "steps": 70, "query_heads": 2, "kv_heads": 1, "batch": 1},
        {"anchors": [19, 9], "window": 33, "window_from": "step"},
    ),
    "window from the step, padding": (
        {"length": 100, "num_anchors": 12}, {
            "anchors": spread(12, 100), "window": 50, "window_from": "step", "key_start": [0, 37],
        },
    ),
    "everything over blocks": (
        {"length": 130, "num_anchors": 24, "head": 20, "value_head": 40},
        {
            "anchors": [spread(24, 130), [a if a % 5 else -1 for a in spread(24, 90)]], "window": 70,
            "window_from": "step", "key_start": documents(24, 130, 90), "causal": False, "softcap": 1.5,
            "thought_lengths": [i % 4 for i in range(24)],
        },
    ),
    "softcap over blocks, negative scale": (
        {"length": 100, "num_anchors": 12, "batch": 1}, {"anchors": spread(12, 100), "softcap": 1.2, "scale": -0.8},
    ),
    "softcap that is never reached": ({"length": 3, "batch": 1}, {"softcap": 3e4}),
    "huge softcap": ({"length": 3, "batch": 1}, {"softcap": 1e36}),
    "tiny softcap": ({"length": 3, "batch": 1}, {"softcap": 1e-45}),
    "D = 192, Dv = 128": (
        {"length": 3, "head": 192, "value_head": 128, "query_heads": 2, "kv_heads": 1, "batch": 1}, {},
    ),
    "negative scale": ({"length": 3, "batch": 1}, {"scale": -0.4}),
    "scale of zero": ({"length": 3, "batch": 1}, {"scale": 0.0}),
}  # fmt: skip


def solve(inputs, options, grads, backend, dtype=None):
    """Output, lse and gradients by name, through output and lse."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    output, lse = thought_attention(*leaves, **options, return_lse=True, backend=backend)
    weighted_sum(output, lse, *(grad.to(dtype or grad.dtype) for grad in grads)).backward()
    return dict(zip(NAMES, (output.detach(), lse.detach(), *(x.grad for x in leaves)), strict=True))


def incoming(inputs):
    query, _, value = inputs[:3]
    rows = query.shape[:-1]
    return torch.randn(*rows, value.shape[-1], dtype=query.dtype, device=DEVICE), torch.randn(rows, device=DEVICE)


def assert_right(inputs, options):
    grads = incoming(inputs)
    actual = solve(inputs, options, grads, "triton")
    eager = solve(inputs, options, grads, "reference")
    oracle = solve(inputs, options, grads, "reference", torch.float64)
    for name in NAMES:
        assert actual[name].dtype == eager[name].dtype
        assert_as_accurate(actual[name], eager[name], oracle[name], unit=inputs[0].dtype, name=name)
    return actual


@pytest.mark.parametrize(("name", "dtype"), with_triton_dtypes([*CASES, *LARGE]))
def test_values_and_gradients(name, dtype):
    assert_right(*case(name, dtype, DEVICE, CASES | LARGE))


@pytest.mark.skipif(interpreted(), reason="for the tiles of GPUs; the interpreter would take minutes")
@pytest.mark.parametrize(("name", "dtype"), with_triton_dtypes([*GPU_CASES]))
def test_values_and_gradients_over_tiles(name, dtype):
    assert_right(*case(name, dtype, DEVICE, GPU_CASES))


@pytest.mark.parametrize("count", [3, 12], ids="{} anchors".format)  # less than a tile of rows, more than one
@pytest.mark.parametrize(
    "name",
    ["full blocks", "padding and window over blocks", "documents over blocks", "window from the step, padding",
     "everything over blocks"],
)  # fmt: skip
def test_split_over_programs(name, count, monkeypatch):
    """Few rows, few keys: the forward splits the keys, the backward the rows, to fill more processors."""
    monkeypatch.setattr(triton_launch, "processors", lambda device: 64)
    monkeypatch.setattr(triton_launch, "SPLIT_KEYS", 32)
    monkeypatch.setattr(triton_launch, "SPLIT_ROWS", 16)
    inputs, options = case(name, device=DEVICE, cases=CASES | LARGE)
    for of_anchors in ("anchors", "key_start", "thought_lengths"):
        if of_anchors in options and options[of_anchors].shape[-1] > 2:
            options[of_anchors] = options[of_anchors][..., :count]
    inputs = [x[:, :, :count] if x.dim() == 5 else x for x in inputs]
    assert_right(inputs, options)


def transformers_layout(x):
    """[B, H, ..., D] as a view of [B, ..., H, D], with anchors and steps in one dimension there."""
    return x.flatten(2, -2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, x.shape[2:-1])


STRIDES = {
    "as transformers has them": transformers_layout,
    "a part of a larger cache": lambda x: torch.cat([x, x], dim=-2)[..., : x.shape[-2], :],
    "anchors in front": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "elements apart": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "one batch for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("strided", STRIDES.values(), ids=STRIDES)
def test_strides(strided):
    inputs, options = case("window, padding, anchors", device=DEVICE)
    inputs = [strided(x.detach()) for x in inputs]
    assert not inputs[0].is_contiguous()
    assert_right(inputs, options)


def test_scores_of_zero_stay_zero_at_any_scale():
    query, *others = make_inputs(batch=1, length=2, device=DEVICE)
    query = torch.zeros_like(query)
    extreme = thought_attention(query, *others, scale=1e12, softcap=1e-45, backend="triton")
    assert torch.equal(extreme, thought_attention(query, *others, backend="triton"))


class Recorder:
    """In the place of a kernel: keeps the arguments of its launch."""

    def __getitem__(self, grid):
        return lambda *arguments, **_: setattr(self, "arguments", arguments)


@pytest.mark.parametrize("strided", [name for name in STRIDES if name != "elements apart"])
def test_no_strided_input_is_copied(strided, monkeypatch):
    inputs = [STRIDES[strided](x.detach()) for x in case("all positions", device=DEVICE)[0]]
    monkeypatch.setattr(backend_triton, "forward_kernel", Recorder())
    inputs = Inputs(*inputs)
    backend_triton.forward(inputs, Mask.of(inputs))
    for given, launched in zip(inputs, backend_triton.forward_kernel.arguments, strict=False):
        assert launched.data_ptr() == given.data_ptr()


@pytest.fixture(scope="module")
def wide_memory():
    """Zeros around a middle, as far as 32-bit offsets reach below it and further above; what is untouched is free."""
    below, above = 2**31, 3 * 2**30 + 2**16
    memory = mmap.mmap(-1, (below + above) * torch.float16.itemsize)
    return torch.frombuffer(memory, dtype=torch.float16)[below:]


# Sizes, then what is far apart: a dimension of tensors of so many dimensions, and its stride.
FAR = {
    "batches": ({"batch": 4}, 0, (4, 5), 2**30),
    "heads": ({"query_heads": 4, "kv_heads": 4}, 1, (4, 5), 2**30),
    "heads of a group": ({"query_heads": 4, "kv_heads": 1}, 1, (5,), 2**30),
    "anchors": ({"num_anchors": 4}, 2, (5,), 2**30),
    "steps": ({"steps": 3, "head": 5}, 3, (5,), 2**30),  # in units of one element, too many for 32 bits
    "base keys": ({"length": 40}, 2, (4,), 2**26),
}


@pytest.mark.skipif(DEVICE == "cuda", reason="would take all of a GPU's memory; the interpreter computes offsets alike")
@pytest.mark.parametrize("far", FAR)
def test_offsets_have_64_bits(far, wide_memory):
    """Every stride fits 32 bits, the offsets of the last elements do not."""
    sizes, dimension, ranks, stride = FAR[far]
    inputs = make_inputs(**{"batch": 1, "length": 3, "num_anchors": 2} | sizes, dtype=torch.float16)
    last = inputs[1].shape[2] - 1
    options = {"anchors": torch.tensor([last, 0, 1, 2][: inputs[0].shape[2]], dtype=torch.int32)}
    grads = incoming(inputs)
    near = solve(inputs, options, grads, "triton")
    starts = itertools.count(wide_memory.storage_offset(), step=8192)

    def spread_out(x):
        if x.dim() not in ranks or x.shape[dimension] == 1:
            return x.detach()
        strides = [*x.stride()]
        strides[dimension] = stride
        return torch.as_strided(wide_memory, x.shape, strides, next(starts)).copy_(x.detach())

    grad_output, grad_lse = grads
    wide = solve(list(map(spread_out, inputs)), options, (spread_out(grad_output), grad_lse), "triton")
    for name in NAMES:
        assert torch.equal(wide[name], near[name]), name


@pytest.mark.parametrize("layout", ["transformers", "expanded"])
def test_strides_of_the_gradient(layout):
    inputs, options = case("unsorted, repeated, inactive", device=DEVICE)
    output = thought_attention(*inputs, **options, backend="triton")
    grad = torch.randn_like(output)
    if layout == "expanded":
        grad = grad[..., :1, :1].expand(grad.shape)
    strided = transformers_layout(grad) if layout == "transformers" else grad
    expected = torch.autograd.grad(output, inputs, grad.contiguous(), retain_graph=True)
    for actual, same in zip(torch.autograd.grad(output, inputs, strided), expected, strict=True):
        assert torch.equal(actual, same)


@pytest.mark.parametrize("wanted", INPUTS)
def test_each_input_alone_can_need_a_gradient(wanted):
    inputs, options = case("earlier steps cached (S < T)", device=DEVICE)
    grads = incoming(inputs)
    leaves = [x.detach().requires_grad_(name == wanted) for name, x in zip(INPUTS, inputs, strict=True)]
    weighted_sum(*thought_attention(*leaves, **options, return_lse=True, backend="triton"), *grads).backward()
    full = solve(inputs, options, grads, "triton")
    for name, x in zip(INPUTS, leaves, strict=True):
        assert torch.equal(x.grad, full[f"d_{name}"]) if name == wanted else x.grad is None


@pytest.mark.parametrize("name", ["window over blocks", "everything over blocks"])
def test_gradients_are_bitwise_reproducible(name):
    inputs, options = case(name, torch.float16, DEVICE, LARGE)
    grads = incoming(inputs)
    first, second = (solve(inputs, options, grads, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_order_of_anchors_changes_nothing():
    """Rows of permuted anchors are the permuted rows, to the bit: kernels go through them sorted in any case."""
    inputs, options = case("full blocks", device=DEVICE, cases=LARGE)
    sorted_anchors, order = options["anchors"].sort()
    output = thought_attention(*inputs, **options, backend="triton")
    query, key, value, *thoughts = inputs
    permuted = (query[:, :, order], key, value, *(x[:, :, order] for x in thoughts))
    assert torch.equal(thought_attention(*permuted, anchors=sorted_anchors, backend="triton"), output[:, :, order])


@pytest.fixture
def blocks_read(monkeypatch):
    """How often interpreted kernels read a block of base keys, thought keys, or rows for the gradients of keys."""
    counts = collections.Counter()

    def count(module, function):
        original = getattr(module, function)

        def counted(*arguments):
            counts[function] += 1
            return original(*arguments)

        monkeypatch.setattr(module, function, counted)

    for module in (triton_forward, triton_backward_query):
        count(module, "load_block")
        count(module, "diagonal_columns")
    count(triton_backward_key, "_load_rows")
    return counts


def reads(blocks_read, lengths, **sizes):
    inputs, options = case("", device=DEVICE, cases={"": (sizes, {"thought_lengths": lengths})})
    blocks_read.clear()
    torch.autograd.grad(thought_attention(*inputs, **options, backend="triton").sum(), inputs)
    return dict(blocks_read)


@pytest.mark.interpreted
def test_steps_that_do_not_exist_are_skipped(blocks_read):
    """Anchors with 2 tiles of rows each: without the second ones kernels read half of the blocks or less."""
    all_steps, half_of_them = (
        reads(blocks_read, [length] * 2, length=2, steps=128, query_heads=1, kv_heads=1, batch=1)
        for length in (128, 64)
    )
    assert all(half_of_them[name] <= count / 2 for name, count in all_steps.items())


@pytest.mark.interpreted
@pytest.mark.parametrize("length", [0, 2])
def test_thoughts_without_a_query_are_skipped(length, blocks_read):
    assert reads(blocks_read, [length] * 40, length=40, steps=2, thought_steps=4) == {}


def test_keys_that_no_row_sees_may_hold_anything():
    inputs, options = case("window, padding, anchors", device=DEVICE)
    options["anchors"] = torch.tensor([[4, 3, -1], [4, 4, 3]], device=DEVICE)
    expected = thought_attention(*inputs, **options, backend="triton")
    with torch.no_grad():
        for base in inputs[1:3]:
            base[:, :, 5] = math.nan
            base[1, :, :2] = math.nan
    assert torch.equal(thought_attention(*inputs, **options, backend="triton"), expected)


@pytest.mark.parametrize("name", ["window, padding, anchors", "documents, window, S < T", "everything at once"])
def test_opcheck(name):
    inputs, options = case(name, device=DEVICE)
    inputs = [x.detach() for x in inputs]
    mask = *Mask.of(Inputs(*inputs), **options), "triton"
    output, lse = torch.ops.quietstar.thought_attention(*inputs, *mask)
    torch.library.opcheck(torch.ops.quietstar.thought_attention, (*inputs, *mask))
    grads = (torch.randn_like(output), torch.randn_like(lse), *inputs, output, lse, *mask)
    torch.library.opcheck(torch.ops.quietstar.thought_attention_backward, grads)


def test_compiles_without_graph_breaks():
    inputs, options = case("window, padding, anchors", device=DEVICE)

    def loss(*tensors):
        return thought_attention(*tensors, **options, backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss)), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("sizes", [{"num_anchors": 0}, {"batch": 0}, {"steps": 0, "thought_steps": 2}], ids=str)
def test_nothing_to_do(sizes):
    inputs, _ = case("x", device=DEVICE, cases={"x": (sizes, {})})
    anchors = torch.zeros(inputs[0].shape[2], dtype=torch.int64, device=DEVICE)
    output = thought_attention(*inputs, anchors=anchors, backend="triton")
    assert output.shape == inputs[0].shape
    assert not any(grad.any() for grad in torch.autograd.grad(output.sum(), inputs))


def test_a_model_learns_the_same(monkeypatch):
    """Loss and gradients of a whole tree pass, left-padded, as with the torch backend."""
    pytest.importorskip("transformers")
    from quietstar import QuietStarConfig, QuietStarForCausalLM
    from quietstar.models.layouts import attention

    config = QuietStarConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, thought_length=2, lookahead=2, num_thoughts=2, sliding_window=5,
        start_thought_token_id=48, end_thought_token_id=49,
        policy_weight=1.0,  # the paper's 1e6 would magnify the rounding of the rewards
    )  # fmt: skip
    model = QuietStarForCausalLM(config).to(DEVICE)
    torch.nn.init.normal_(model.mixing_head[-1].weight)  # at zero it would hide the thoughts
    tokens = torch.randint(48, (2, 8), device=DEVICE)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    thoughts = torch.randint(48, (2, 2, 8, 2), device=DEVICE)
    results = {}
    for backend in ("torch", "triton"):
        monkeypatch.setattr(attention, "thought_attention", partial(thought_attention, backend=backend))
        loss = model(tokens, attention_mask=mask, labels=tokens, thought_tokens=thoughts).loss
        results[backend] = loss, *torch.autograd.grad(loss, list(model.parameters()))
    for actual, expected in zip(results["triton"], results["torch"], strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm().clamp_min(1e-30)


UNAVAILABLE = {
    "dtype": ({"dtype": torch.float64}, "its kernels compute in float32"),
    "head size": ({"head": 257}, "at most 256 elements, got D = 257"),
    "head size of values": ({"value_head": 300}, "at most 256 elements, got Dv = 300"),
}


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_what_it_cannot_do_names_who_can(name):
    sizes, reason = UNAVAILABLE[name]
    inputs, _ = case("x", sizes.pop("dtype", torch.float32), DEVICE, {"x": (sizes, {})})
    with pytest.raises(ValueError, match=f"'triton' cannot run.*{reason}.*usable here: .*torch, reference"):
        thought_attention(*inputs, backend="triton")


@pytest.mark.interpreted
def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"need a GPU.*usable here: .*torch, reference"):
        thought_attention(*case("all positions")[0], backend="triton")
