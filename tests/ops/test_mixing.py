"""mix_logits and mixed_cross_entropy: every backend against plain PyTorch in float64."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from backends import ALL, ANY_DTYPE, FAST, with_dtypes
from impossible_tokens import assert_impossible_tokens_right
from memory import peak_bytes
from tolerances import assert_as_accurate

from quietstar.ops import _rows, mix_logits, mixed_cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Room for two rows of a vocabulary of 77, or one of a larger one."""
    monkeypatch.setitem(_rows.BLOCK_BYTES, "cpu", 2 * 77 * 4)


def make_inputs(leading=(5,), vocabulary=77, size=3.0, dtype=torch.float32):
    base, thought = (size * torch.randn(*leading, vocabulary) for _ in range(2))
    return base.to(dtype), thought.to(dtype), torch.randn(leading).mul(2).to(dtype)


def make_target(leading=(5,), vocabulary=77, ignored=0):
    target = torch.randint(vocabulary, leading)
    target.view(-1)[:ignored] = -100
    return target


def plain_mix(base, thought, mixing):
    return (1 - mixing[..., None]) * base + mixing[..., None] * thought


def plain_cross_entropy(base, thought, mixing, target, reduction="mean"):
    logits = plain_mix(base, thought, mixing)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction=reduction)
    return loss.view(target.shape) if reduction == "none" else loss


def run(function, inputs, incoming=None, dtype=None):
    """Result and gradients, for an incoming gradient of ones unless given."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    result = function(*leaves)
    result.backward(torch.ones_like(result) if incoming is None else incoming.to(result.dtype))
    values = result.detach(), *(x.grad for x in leaves)
    return dict(zip(("result", "d_base", "d_thought", "d_mixing"), values, strict=True))


def assert_run_as_accurate(actual, function, inputs, incoming=None, **tolerance):
    eager, oracle = run(function, inputs, incoming), run(function, inputs, incoming, torch.float64)
    for name, value in actual.items():
        assert_as_accurate(value, eager[name], oracle[name], name=name, **tolerance)


SHAPES = {
    "a row": {"leading": ()},
    "rows": {},
    "more dimensions": {"leading": (2, 3, 2)},
    "no rows": {"leading": (0,)},
    "one token": {"vocabulary": 1},
    "V = 7": {"vocabulary": 7},
    "V = 1000": {"vocabulary": 1000},
    "V = 32002": {"vocabulary": 32002, "leading": (3,)},
    "huge": {"size": 1e3},
}


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(DTYPES))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mix_logits(shape, dtype, backend):
    inputs = make_inputs(dtype=dtype, **shape)
    incoming = torch.randn_like(inputs[0])
    actual = run(lambda *x: mix_logits(*x, backend=backend), inputs, incoming)
    assert all(x.dtype == dtype for x in actual.values())
    assert_run_as_accurate(actual, plain_mix, inputs, incoming, ulps=1)


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(DTYPES))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [x for name, x in SHAPES.items() if name not in ("a row", "no rows")], ids=str)
def test_mixed_cross_entropy(shape, dtype, reduction, backend):
    inputs = make_inputs(dtype=dtype, **shape)
    target = make_target(inputs[2].shape, inputs[0].shape[-1], ignored=1)
    incoming = torch.randn(target.shape if reduction == "none" else ())
    actual = run(lambda *x: mixed_cross_entropy(*x, target, reduction=reduction, backend=backend), inputs, incoming)
    assert actual["result"].dtype == torch.float32
    assert all(x.dtype == dtype for name, x in actual.items() if name != "result")
    assert_run_as_accurate(
        actual, lambda *x: plain_cross_entropy(*x, target, reduction), inputs, incoming,
        unit=dtype, ulps=1 + 7 * dtype.itemsize // 4,
    )  # fmt: skip


@pytest.mark.usefixtures("default_backend")
def test_single_row_without_leading_dimensions():
    inputs, target = make_inputs(()), torch.tensor(5)
    torch.testing.assert_close(
        mixed_cross_entropy(*inputs, target), F.cross_entropy(plain_mix(*inputs)[None], target[None])
    )


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("leading", [(4,), (0,)])
def test_no_labels(leading, reduction, backend):
    target = make_target(leading, ignored=4)
    actual = run(lambda *x: mixed_cross_entropy(*x, target, reduction=reduction, backend=backend), make_inputs(leading))
    for name, value in actual.items():
        assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_may_hold_anything(reduction, backend):
    inputs, target = make_inputs(), make_target(ignored=3)

    def call(*x):
        return mixed_cross_entropy(*x, target, reduction=reduction, backend=backend)

    expected = run(call, inputs)
    for i, x in enumerate(inputs):
        x[i] = float("nan")
    inputs[0][:2, 3], inputs[1][1], inputs[0][2] = float("inf"), float("-inf"), 1e38
    for name, value in run(call, inputs).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.usefixtures("default_backend")
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_probabilities_of_huge_logits(offset):
    """The backward finds the probabilities again to full precision: an offset of all logits changes little."""
    base = torch.tensor([[1.0, 0.5, -0.25]]) + offset
    base.requires_grad_()
    mixed_cross_entropy(base, base.detach(), torch.zeros(1), torch.tensor([0])).backward()
    expected = base.detach().double().softmax(1) - torch.tensor([1.0, 0, 0])
    torch.testing.assert_close(base.grad.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("default_backend")
def test_gradient_of_a_confident_prediction():
    base = torch.tensor([[12.0, 0.0, 0.0]], requires_grad=True)
    mixed_cross_entropy(base, torch.zeros(1, 3), torch.zeros(1), torch.tensor([0])).backward()
    expected = -2 / (torch.tensor(12.0, dtype=torch.float64).exp() + 2)
    torch.testing.assert_close(base.grad[0, 0].double(), expected, rtol=1e-2, atol=0)


def strided(x):
    """The same values with other strides, in the leading dimensions too, which then cannot be flattened."""
    padded = torch.stack([x, x], dim=-1)
    return padded.transpose(0, 1).contiguous().transpose(0, 1)[..., 0]


@pytest.mark.usefixtures("default_backend")
@pytest.mark.parametrize("function", ["mix", "cross entropy"])
def test_strides(function):
    """Strided inputs and stride-0 gradients give what contiguous ones give."""
    inputs, target = make_inputs((3, 4)), make_target((3, 4))
    call = mix_logits if function == "mix" else lambda *x: mixed_cross_entropy(*x, target, reduction="none")
    others = [strided(x) for x in inputs]
    assert not any(x.is_contiguous() for x in others)
    expanded = torch.tensor(0.5).expand_as(call(*inputs))
    expected, actual = run(call, inputs, expanded.contiguous()), run(call, others, expanded)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(DTYPES))
@pytest.mark.parametrize("vocabulary", [5, 77, 1000])
@pytest.mark.parametrize("function", ["mix", "cross entropy"])
def test_impossible_tokens(function, vocabulary, dtype, backend):
    assert_impossible_tokens_right(function, backend, dtype, vocabulary)


@pytest.mark.parametrize("backend", ALL)
def test_what_is_broken_is_seen(backend):
    """A row of −∞, and NaN or +∞ in one prediction, even if its weight is 0; an impossible target is something else."""
    base, thought, _ = make_inputs((4,))
    base[0] = thought[0] = float("-inf")
    base[1, 5], thought[2, 5], base[3, 6], thought[3, 6] = float("inf"), float("nan"), float("-inf"), float("-inf")
    target = torch.full((4,), 6)
    nll = mixed_cross_entropy(base, thought, torch.zeros(4), target, reduction="none", backend=backend)
    assert nll.isnan().tolist() == [True, True, True, False]
    assert nll[3] == float("inf")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("function", ["mix", "cross entropy"])
def test_a_second_derivative_is_an_error(function, backend):
    """Not a gradient without a graph, which a penalty on it would not move."""
    inputs = [x.requires_grad_() for x in make_inputs()]
    result = mix_logits(*inputs, backend=backend) if function == "mix" else None
    if result is None:
        result = mixed_cross_entropy(*inputs, make_target(), backend=backend)
    for gradient in torch.autograd.grad(result.sum(), inputs, create_graph=True):
        for leaf in inputs:
            with pytest.raises(RuntimeError, match="differentia"):
                torch.autograd.grad(result.sum() + gradient.square().sum(), leaf, retain_graph=True)


@pytest.mark.parametrize("backend", ALL)
def test_expanded_numbers(backend):
    """Targets and weights of stride 0, and gradients too."""
    base, thought, _ = make_inputs((3, 4))
    weight, target = torch.tensor(0.3), torch.tensor(5)
    results = []
    for spread in (lambda x: x.expand(3, 4), lambda x: x.expand(3, 4).contiguous()):
        leaves = [x.clone().requires_grad_() for x in (base, thought, weight)]
        nll = mixed_cross_entropy(*leaves[:2], spread(leaves[2]), spread(target), reduction="none", backend=backend)
        results.append((nll.detach(), *torch.autograd.grad(nll.sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("default_backend")
@pytest.mark.parametrize("function", ["mix", "cross entropy"])
def test_each_subset_of_gradients(function):
    inputs, target = make_inputs(), make_target()
    call = mix_logits if function == "mix" else lambda *x: mixed_cross_entropy(*x, target)
    full = list(run(call, inputs).values())[1:]
    for needs in itertools.product([False, True], repeat=3):
        leaves = [x.clone().requires_grad_(needed) for x, needed in zip(inputs, needs, strict=True)]
        result = call(*leaves).sum()
        assert result.requires_grad == any(needs)
        if any(needs):
            result.backward()
        for x, needed, gradient in zip(leaves, needs, full, strict=True):
            assert torch.equal(x.grad, gradient) if needed else x.grad is None


@pytest.mark.usefixtures("default_backend")
@pytest.mark.parametrize("function", ["mix", "cross entropy"])
def test_second_backward_and_second_run_are_bitwise_equal(function):
    inputs, target = [x.requires_grad_() for x in make_inputs()], make_target(ignored=2)
    call = mix_logits if function == "mix" else lambda *x: mixed_cross_entropy(*x, target)
    result = call(*inputs).sum()
    first = torch.autograd.grad(result, inputs, retain_graph=True)
    second = torch.autograd.grad(result, inputs)
    again = torch.autograd.grad(call(*inputs).sum(), inputs)
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("backend", ANY_DTYPE)
@pytest.mark.parametrize("reduction", [None, "mean", "sum", "none"])
def test_gradcheck(reduction, backend):
    inputs = [x.requires_grad_() for x in make_inputs((3,), vocabulary=5, size=1, dtype=torch.float64)]
    target = make_target((3,), vocabulary=5, ignored=1)

    def call(*x):
        if reduction is None:
            return mix_logits(*x, backend=backend)
        return mixed_cross_entropy(*x, target, reduction=reduction, backend=backend)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("backend", ALL)
def test_mixing_weight_may_be_float32(backend):
    base, thought, mixing = make_inputs(dtype=torch.bfloat16)
    target = make_target()
    for call in (mix_logits, lambda *x, **options: mixed_cross_entropy(*x, target, **options)):
        actual = run(lambda *x, call=call: call(*x, backend=backend), (base, thought, mixing.float()))
        expected = run(call, (base, thought, mixing))
        assert actual["d_mixing"].dtype == torch.float32
        assert torch.equal(actual["result"], expected["result"])
        assert torch.equal(actual["d_mixing"].bfloat16(), expected["d_mixing"])


@pytest.mark.parametrize("backend", ALL)
def test_autocast_changes_nothing(backend):
    inputs, target = make_inputs(), make_target()
    expected = mix_logits(*inputs, backend=backend), mixed_cross_entropy(*inputs, target, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        actual = mix_logits(*inputs, backend=backend), mixed_cross_entropy(*inputs, target, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", ALL)
def test_compile(backend):
    inputs, target = make_inputs((2, 3)), make_target((2, 3), ignored=1)

    def call(*x):
        mixed = mix_logits(*x, backend=backend)
        return mixed.square().mean() + mixed_cross_entropy(*x, target, backend=backend)

    torch._dynamo.reset()
    compiled = run(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs)
    for name, value in run(call, inputs).items():
        torch.testing.assert_close(compiled[name], value, msg=name)


def test_compiled_wrong_target_gives_nan():
    compiled = torch.compile(mixed_cross_entropy, fullgraph=True, backend="aot_eager")
    nll = compiled(*make_inputs((3,), vocabulary=5), torch.tensor([0, 5, -100]), reduction="none")
    assert nll.isnan().tolist() == [False, True, False]


def test_opcheck(default_backend):
    base, thought, mixing = make_inputs((2, 3), vocabulary=5, dtype=torch.bfloat16)
    target, grad = make_target((2, 3), 5), torch.rand(2, 3)
    ops = torch.ops.quietstar
    check = torch.library.opcheck
    check(ops.mix_logits.default, (base, thought, mixing, default_backend))
    check(ops.mixed_cross_entropy.default, (base, thought, mixing, target, default_backend))
    for needs in itertools.product([True, False], repeat=2):
        check(ops.mix_logits_backward.default, (thought, base, thought, mixing, [True, *needs], default_backend))
        arguments = grad, base, thought, mixing, target, *[grad] * 4, list(needs), default_backend
        check(ops.mixed_cross_entropy_backward.default, arguments)


@pytest.mark.usefixtures("default_backend")
def test_peak_memory(monkeypatch):
    """The mix is never written: beyond the gradients there are only blocks and a few numbers per row."""
    monkeypatch.setitem(_rows.BLOCK_BYTES, "cpu", 64 << 10)
    inputs, target = [x.requires_grad_() for x in make_inputs((256,), vocabulary=4000)], make_target((256,), 4000)
    logits = inputs[0].numel() * 4
    peak = peak_bytes(lambda: mixed_cross_entropy(*inputs, target).backward())
    assert peak >= 2 * logits, "the measurement misses something"
    assert peak <= 2.15 * logits


def valid():
    return {
        "base_logits": torch.randn(2, 3, 5), "thought_logits": torch.randn(2, 3, 5), "mixing_weight": torch.randn(2, 3),
        "target": torch.zeros(2, 3, dtype=torch.int64),
    }  # fmt: skip


BAD = [
    ({"base_logits": 1.0}, TypeError, "base_logits must be a torch.Tensor, got float"),
    ({"base_logits": torch.tensor(1.0)}, ValueError, "base_logits must have shape [..., V] with V >= 1, got []"),
    ({"base_logits": torch.zeros(2, 3, 5).int()}, TypeError, "base_logits must be float16, bfloat16, float32"),
    ({"thought_logits": torch.randn(2, 3, 6)}, ValueError, "thought_logits must have the shape of base_logits, [2, 3"),
    ({"thought_logits": torch.randn(2, 3, 5).half()}, TypeError, "thought_logits must have the dtype of base_logits"),
    ({"thought_logits": torch.randn(2, 3, 5, device="meta")}, ValueError, "thought_logits must be on the device of"),
    ({"mixing_weight": torch.randn(2, 3, 1)}, ValueError, "mixing_weight must have the leading shape of base_logits"),
    ({"mixing_weight": torch.randn(2, 3).double()}, TypeError, "mixing_weight must be float32 or have the dtype of"),
    ({"backend": "cuda"}, ValueError, "backend: 'cuda' cannot run mix"),
]
BAD_TARGET = [
    ({"target": torch.zeros(6, dtype=torch.int64)}, ValueError, "target must have the shape of mixing_weight, [2, 3]"),
    ({"target": torch.zeros(2, 3)}, TypeError, "target must be int32 or int64, got torch.float32"),
    ({"target": torch.full((2, 3), 5)}, ValueError, "target must be in [0, 5) or ignore_index = -100, got 5"),
    ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
    ({"ignore_index": -1.5}, TypeError, "ignore_index must be an integer, got float"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD + BAD_TARGET)
def test_bad_input(change, error, message):
    mixed_cross_entropy(**valid())
    with pytest.raises(error, match=re.escape(message)):
        mixed_cross_entropy(**{**valid(), **change})


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_to_mix(change, error, message):
    arguments = {name: x for name, x in {**valid(), **change}.items() if name != "target"}
    with pytest.raises(error, match=re.escape(message)):
        mix_logits(**arguments)
