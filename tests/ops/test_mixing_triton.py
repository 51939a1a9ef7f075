"""The Triton kernels of mixing against the specification: on a GPU if there is one, else in Triton's interpreter.

`pytest --emulate sm_90` compiles them and emulates the GPU: docs/testing_kernels.md.
"""

import itertools

import pytest
import torch
from backends import triton_dtypes
from impossible_tokens import assert_impossible_tokens_right
from tolerances import assert_as_accurate

from quietstar.ops import mix_logits, mixed_cross_entropy

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # By the interpreter, in lanes that are masked or not chosen.
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = triton_dtypes()
NAMES = "result", "d_base", "d_thought", "d_mixing"


@pytest.fixture(params=["mix", "cross entropy"])
def function(request):
    return request.param


class Problem:
    def __init__(self, function, leading=(5,), vocabulary=77, dtype=torch.float32, size=3.0, ignored=(1,)):
        logits = (torch.randn([*leading, vocabulary], device=DEVICE).mul(size).to(dtype) for _ in range(2))
        self.inputs = [*logits, torch.randn(leading, device=DEVICE).mul(2).to(dtype)]
        self.target = torch.randint(vocabulary, leading, device=DEVICE)
        self.target.view(-1)[list(ignored)] = -100
        self.function = function
        self.incoming = torch.randn([*leading, *[vocabulary] * (function == "mix")], device=DEVICE)

    def call(self, *inputs, backend="triton"):
        if self.function == "mix":
            return mix_logits(*inputs, backend=backend)
        return mixed_cross_entropy(*inputs, self.target, reduction="none", backend=backend)

    def run(self, backend, dtype=None):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_(x.requires_grad) for x in self.inputs]
        result = self.call(*leaves, backend=backend)
        result.backward(self.incoming.to(result.dtype))
        return dict(zip(NAMES, (result.detach(), *(x.grad for x in leaves)), strict=True))

    def solve(self, needs=(True, True, True)):
        for x, needed in zip(self.inputs, needs, strict=True):
            x.requires_grad_(needed)
        return self.run("triton")


def assert_right(problem):
    actual = problem.solve()
    eager, oracle = problem.run("reference"), problem.run("reference", torch.float64)
    dtype = problem.inputs[0].dtype
    for name in NAMES:
        assert actual[name].dtype == eager[name].dtype
        is_a_sum = problem.function != "mix" or (name == "d_mixing" and dtype == torch.float32)
        ulps = 1 + 7 * dtype.itemsize // 4 if is_a_sum else 1
        assert_as_accurate(actual[name], eager[name], oracle[name], unit=dtype, ulps=ulps, name=name)


SHAPES = {
    "a row": {"leading": (), "ignored": ()},
    "rows": {},
    "more dimensions": {"leading": (2, 3, 2)},
    "one token": {"vocabulary": 1},
    "V = 7": {"vocabulary": 7},
    "V = 1000": {"vocabulary": 1000},
    "V = 32002": {"vocabulary": 32002, "leading": (2,)},
    "huge": {"size": 1e3},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_results_and_gradients(shape, dtype, function):
    assert_right(Problem(function, dtype=dtype, **shape))


def test_no_rows(function):
    assert all(x.numel() == 0 for x in Problem(function, leading=(0, 3), ignored=()).solve().values())


STRIDES = {
    "leading": lambda x: torch.stack([x, x]).transpose(1, 2).contiguous().transpose(1, 2)[1],
    "last": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "unaligned": lambda x: torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(x.shape),
    "outer expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("vocabulary", [64, 77])
@pytest.mark.parametrize("strided", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1, 2)], ids=str)
def test_strides(which, strided, vocabulary, function):
    problem = Problem(function, leading=(3, 4), vocabulary=vocabulary)
    for i in which:
        problem.inputs[i] = strided(problem.inputs[i])
    assert_right(problem)


def test_expanded_gradient(function):
    problem = Problem(function)
    problem.incoming = torch.tensor(0.5, device=DEVICE).expand(problem.incoming.shape)
    assert_right(problem)


def test_each_subset_of_gradients(function):
    problem = Problem(function)
    full = problem.solve()
    for needs in itertools.product([False, True], repeat=3):
        if any(needs):
            actual = problem.solve(needs)
            for name, needed in zip(NAMES[1:], needs, strict=True):
                assert torch.equal(actual[name], full[name]) if needed else actual[name] is None


def test_second_run_is_bitwise_equal(function):
    problem = Problem(function, vocabulary=5000)
    first, second = problem.solve(), problem.solve()
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(reduction):
    problem = Problem("cross entropy", ignored=range(5))
    inputs = [x.requires_grad_() for x in problem.inputs]
    loss = mixed_cross_entropy(*inputs, problem.target, reduction=reduction, backend="triton").sum()
    for value in (loss, *torch.autograd.grad(loss, inputs)):
        assert torch.equal(value, torch.zeros_like(value))


def test_ignored_rows_may_hold_anything():
    problem = Problem("cross entropy", ignored=(0, 1, 2))
    expected = problem.solve()
    for i, x in enumerate(problem.inputs):
        x.detach()[i] = float("nan")
        x.detach()[1] = float("inf")
    for name, value in problem.solve().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("vocabulary", [5, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_impossible_tokens(dtype, vocabulary, function):
    assert_impossible_tokens_right(function, "triton", dtype, vocabulary, DEVICE)


def test_probabilities_of_huge_logits():
    """The backward finds the probabilities again to full precision: an offset of all logits changes little."""
    base = torch.tensor([[1.0, 0.5, -0.25]], device=DEVICE).add(1e4).requires_grad_()
    zero = torch.zeros(1, device=DEVICE)
    mixed_cross_entropy(base, base.detach(), zero, zero.long(), backend="triton").backward()
    expected = base.detach().double().softmax(1) - torch.eye(3, device=DEVICE)[:1]
    torch.testing.assert_close(base.grad.double(), expected, rtol=1e-6, atol=0)


def test_compile(function):
    problem = Problem(function, leading=(2, 3))
    expected = problem.solve()
    torch._dynamo.reset()
    problem.call = torch.compile(problem.call, fullgraph=True, backend="aot_eager")
    for name, value in problem.solve().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_opcheck():
    base, thought, mixing = Problem("mix", (2, 3), 5, torch.float16).inputs
    target, grad = torch.randint(5, (2, 3), device=DEVICE), torch.rand(2, 3, device=DEVICE)
    ops, check = torch.ops.quietstar, torch.library.opcheck
    check(ops.mix_logits.default, (base, thought, mixing, "triton"))
    check(ops.mixed_cross_entropy.default, (base, thought, mixing, target, "triton"))
    for needs in itertools.product([True, False], repeat=2):
        check(ops.mix_logits_backward.default, (thought, base, thought, mixing, [True, *needs], "triton"))
        arguments = grad, base, thought, mixing, target, *[grad] * 4, list(needs), "triton"
        check(ops.mixed_cross_entropy_backward.default, arguments)
