"""The linear cross-entropies in Triton kernels: on a GPU if there is one, else in Triton's interpreter.

`pytest --emulate sm_90` compiles them and emulates the GPU: docs/testing_kernels.md.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from backends import triton_dtypes
from cross_entropy_problem import (
    CASES,
    INPUTS,
    Problem,
    assert_problem_solved,
    assert_rows_that_do_not_count_may_hold_anything,
    assert_stride_0_changes_nothing,
)
from tolerances import assert_as_accurate

from quietstar.ops import _rows
from quietstar.ops._vocabulary import Softmax
from quietstar.ops.linear_cross_entropy import chunks
from quietstar.ops.linear_cross_entropy.inputs import Scales

kernels = pytest.importorskip("quietstar.ops.linear_cross_entropy.backend_triton")
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # By the interpreter, in lanes that are masked or rows that do not count.
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = triton_dtypes()


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """A few chunks, of consecutive rows whether they count or not."""
    monkeypatch.setitem(_rows.CHUNK_BYTES, DEVICE, 4 * 77 * 4)
    monkeypatch.setattr(chunks, "_selected", lambda mask, step: _rows.slices(mask.shape[0], step))


def solve(**case):
    return Problem(device=DEVICE, **case).ours("triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_and_gradients(case, dtype):
    problem = Problem(dtype=dtype, device=DEVICE, **case)
    assert_problem_solved(problem, problem.ours("triton"))


def plain_rows(logits, target, scale, temperature):
    """What a row kernel returns, by PyTorch."""
    logits = logits.detach().requires_grad_()
    nll = F.cross_entropy(logits / temperature, target, reduction="none")
    return nll.detach(), torch.autograd.grad((scale * nll).sum(), logits)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("gradient_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 77, 1000, 32002, 50001])
def test_row_kernel(vocabulary, gradient_dtype, temperature):
    """Both kernels, with a gradient as wide as the logits it overwrites, half as wide, or none."""
    logits = _rows.logits_buffer(3, vocabulary, torch.float32, torch.device(DEVICE))
    logits.copy_(torch.randn(3, vocabulary) * 4)
    target = torch.randint(vocabulary, (3,), device=DEVICE)
    scale = torch.tensor([1.0, 0.0, -0.25], device=DEVICE)
    eager = plain_rows(logits, target, scale, temperature)
    oracle = plain_rows(logits.double(), target, scale.double(), temperature)
    actual = kernels.cross_entropy_rows(
        logits, Softmax(temperature, None, None), target, Scales(scale, None) if gradient_dtype else None, False,
        gradient_dtype or torch.float32,
    )[::2]  # fmt: skip
    assert_as_accurate(actual[0], eager[0], oracle[0])
    if gradient_dtype is None:
        assert actual[1] is None
    else:
        assert actual[1].dtype == gradient_dtype
        assert_as_accurate(actual[1], eager[1], oracle[1])


@pytest.mark.parametrize("vocabulary", [77, 40000])
def test_suppressed_tokens(vocabulary):
    logits = _rows.logits_buffer(2, vocabulary, torch.float32, torch.device(DEVICE))
    logits.normal_()
    logits[:, 5] = 100.0
    suppress, target = torch.tensor([5, 70], device=DEVICE), torch.tensor([3, 4], device=DEVICE)
    kept = logits.index_fill(1, suppress, float("-inf"))
    expected = plain_rows(kept, target, 1.0, 0.7)
    ones = Scales(torch.ones(2, device=DEVICE), None)
    actual = kernels.cross_entropy_rows(logits, Softmax(0.7, None, suppress), target, ones, False, torch.float32)[::2]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not actual[1][:, suppress].any()


@pytest.mark.parametrize("vocabulary", [3, 40000])
@pytest.mark.parametrize("margin", [5.0, 10.0, 16.0])
def test_gradient_of_a_confident_prediction(margin, vocabulary):
    """1 − p(target) down to 1e-5, though p itself rounds to within 6e-8 of 1."""
    logits = torch.full((1, vocabulary), -40.0, device=DEVICE)
    logits[0, :3] = torch.tensor([margin, 0.0, 0.0])
    rest = torch.softmax(logits[0].double(), 0)[1:].sum().item()
    zero, one = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.ones(1, device=DEVICE)
    *_, gradient = kernels.cross_entropy_rows(
        logits, Softmax(1.0, None, None), zero, Scales(one, None), False, torch.float32
    )
    assert gradient[0, 0].item() == pytest.approx(-rest, rel=2**-23 / rest)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mixed", [False, True])
def test_all_rows_ignored(mixed, reduction):
    for name, value in solve(mixed=mixed, ignored=range(11), reduction=reduction).items():
        assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"reduction": "sum", "row_weight": True}], ids=str)
@pytest.mark.parametrize("mixed", [{}, {"mixed": True}, {"mixed": True, "base_rows": 3}], ids=str)
def test_rows_that_do_not_count_may_hold_anything(mixed, options):
    assert_rows_that_do_not_count_may_hold_anything("triton", DEVICE, **mixed, **options)


def test_stride_0_changes_nothing():
    assert_stride_0_changes_nothing("triton", DEVICE)


def test_no_rows():
    actual = solve(rows=0, mixed=True)
    assert not actual["loss"].any()
    assert not actual["d_weight"].any()


@pytest.mark.parametrize("base_rows", [None, 5])
def test_each_subset_of_gradients(base_rows):
    names = INPUTS[:4]
    problem = Problem(mixed=True, base_rows=base_rows, device=DEVICE)
    full = problem.ours("triton")
    for frozen in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names))):
        problem.frozen = frozen
        actual = problem.ours("triton")
        for name in names:
            got, expected = actual[f"d_{name}"], full[f"d_{name}"]
            assert got is None if name in frozen else torch.equal(got, expected), (name, frozen)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_and_second_run_are_bitwise_equal(reduction):
    problem = Problem(mixed=True, base_rows=4, reduction=reduction, device=DEVICE)
    inputs = {name: None if x is None else x.requires_grad_() for name, x in problem.inputs.items()}
    leaves = [x for x in inputs.values() if x is not None]
    loss = problem._call("triton", **inputs).sum() * 3
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    again = torch.autograd.grad(problem._call("triton", **inputs).sum() * 3, leaves)
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("base_rows", [None, 5])
def test_strides(base_rows):
    """Hidden states wider than a block of the kernels, transposed, and every other row of them."""
    problem = Problem(mixed=True, base_rows=base_rows, hidden_size=2100, size=0.05, device=DEVICE)
    expected = problem.ours("triton")
    assert_problem_solved(problem, dict(expected))
    problem.target = torch.stack([problem.target] * 2, dim=1)[:, 0]
    for name, x in problem.inputs.items():
        if x is not None:
            problem.inputs[name] = torch.stack([x.t().contiguous().t()] * 2, dim=1)[:, 0]
    if base_rows:
        problem.base_index = torch.stack([problem.base_index] * 2, dim=1)[:, 0]
    for name, value in problem.ours("triton").items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction):
    problem = Problem(mixed=True, base_rows=4, ignored=(2,), reduction=reduction, device=DEVICE)
    expected = problem.ours("triton")
    torch._dynamo.reset()
    problem._call = torch.compile(problem._call, fullgraph=True, backend="aot_eager")
    for name, value in problem.ours("triton").items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("needs", [[True] * 4, [False] * 4])
def test_opcheck(needs):
    with torch.device(DEVICE):
        hidden, thought, weight = torch.randn(5, 4), torch.randn(6, 4), torch.randn(7, 4)
        target, index = torch.randint(7, (6,)), torch.randint(5, (6,))
        softmax = 0.7, 2.0, torch.tensor([3])
        arguments = hidden, thought, torch.randn(6), index, weight, *softmax, target, torch.rand(6), torch.rand(6)
    torch.library.opcheck(
        torch.ops.quietstar.linear_cross_entropy.default, (*arguments, True, True, needs, "triton")
    )  # fmt: skip
