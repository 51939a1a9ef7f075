"""linear_cross_entropy and mixed_linear_cross_entropy: every backend against plain PyTorch in float64."""

import itertools
from collections import Counter

import pytest
import torch
from backends import ALL, ANY_DTYPE, FAST, with_dtypes
from cross_entropy_problem import (
    CASES,
    INPUTS,
    Problem,
    assert_problem_solved,
    assert_rows_that_do_not_count_may_hold_anything,
    assert_stride_0_changes_nothing,
)
from memory import largest_allocation, peak_bytes
from tolerances import assert_as_accurate

from quietstar.ops import _rows, linear_cross_entropy
from quietstar.ops.linear_cross_entropy import chunks
from quietstar.ops.linear_cross_entropy.backends import BACKENDS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WITH_ENTROPY = {"reduction": "sum", "entropy_weight": True, "softcap": 2.0, "suppress": (1, 70), "temperature": 0.7}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Room for three rows of a vocabulary of 77 in a chunk and for two in a block, or one of a larger vocabulary."""
    monkeypatch.setitem(_rows.CHUNK_BYTES, "cpu", 3 * 77 * 4)
    monkeypatch.setitem(_rows.BLOCK_BYTES, "cpu", 2 * 77 * 4)


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes([torch.float32, torch.bfloat16, torch.float16]))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_and_gradients(case, dtype, backend):
    problem = Problem(dtype=dtype, **case)
    actual = problem.ours(backend)
    assert actual["loss"].dtype == torch.float32
    assert all(actual[f"d_{name}"].dtype == dtype for name, x in problem.inputs.items() if x is not None)
    assert_problem_solved(problem, actual)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mixed", [False, True])
def test_all_rows_ignored(mixed, reduction, backend):
    problem = Problem(mixed=mixed, ignored=range(11), reduction=reduction)
    for name, value in problem.ours(backend).items():
        assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_rows(reduction, backend):
    actual = Problem(rows=0, reduction=reduction).ours(backend)
    assert not actual["loss"].any()
    assert torch.equal(actual["d_weight"], torch.zeros(77, 6))


@pytest.mark.usefixtures("default_backend")
@pytest.mark.parametrize("margin", [5.0, 10.0, 16.0])
def test_gradient_of_a_confident_prediction(margin):
    """1 − p(target) down to 1e-5: each gradient to a relative 1e-2, though p itself rounds to within 6e-8 of 1."""
    hidden = torch.eye(2).requires_grad_()
    weight = torch.tensor([[margin, 0.0], [0.0, margin], [0.0, 0.0]], requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), reduction="sum").backward()
    expected = torch.softmax(torch.tensor([margin, 0, 0], dtype=torch.float64), 0)
    torch.testing.assert_close(
        weight.grad[0, 0].double(), -expected[1:].sum(), rtol=2**-24 / expected[1].item() + 1e-6, atol=0
    )


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("return_nll", [False, True])
def test_row_of_weight_zero_cannot_spoil_the_loss(return_nll, backend):
    hidden, weight = torch.tensor([[float("nan")], [1.0]]), torch.tensor([[1.0], [0.0]])
    result = linear_cross_entropy(
        hidden, weight, torch.tensor([1, 1]), reduction="sum", row_weight=torch.tensor([0.0, 1.0]),
        return_nll=return_nll, backend=backend,
    )  # fmt: skip
    loss = result[0] if return_nll else result
    torch.testing.assert_close(loss, torch.tensor([1.0, 0.0]).logsumexp(0))


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"reduction": "sum", "row_weight": True}], ids=str)
def test_rows_that_do_not_count_are_harmless_where_all_are_computed(options, monkeypatch, default_backend):
    """As on a GPU, where finding the rows that count would wait for the device."""
    monkeypatch.setattr(chunks, "_selected", lambda mask, step: _rows.slices(mask.shape[0], step))
    problem = Problem(ignored=(0, 4), **options)
    assert_problem_solved(problem, problem.ours(default_backend))


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"reduction": "sum", "row_weight": True}], ids=str)
@pytest.mark.parametrize("mixed", [{}, {"mixed": True}, {"mixed": True, "base_rows": 3}], ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_rows_that_do_not_count_may_hold_anything(backend, mixed, options, everywhere, monkeypatch):
    """Also where all rows are computed, as on a GPU."""
    if everywhere:
        monkeypatch.setattr(chunks, "_selected", lambda mask, step: _rows.slices(mask.shape[0], step))
    assert_rows_that_do_not_count_may_hold_anything(backend, **mixed, **options)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("backend", ALL)
def test_a_broken_row_of_weight_zero_has_the_nll_it_has(backend, everywhere, monkeypatch):
    if everywhere:
        monkeypatch.setattr(chunks, "_selected", lambda mask, step: _rows.slices(mask.shape[0], step))
    hidden, weight = torch.randn(3, 4), torch.randn(77, 4, requires_grad=True)
    hidden[1] = float("nan")
    loss, nll = linear_cross_entropy(
        hidden, weight, torch.tensor([1, 2, 3]), reduction="sum", row_weight=torch.tensor([0.0, 0.0, 2.0]),
        return_nll=True, backend=backend,
    )  # fmt: skip
    loss.backward()
    assert nll.isnan().tolist() == [False, True, False]
    assert nll[0] > 0
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("backend", ALL)
def test_stride_0_changes_nothing(backend):
    assert_stride_0_changes_nothing(backend)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"reduction": "none"}, WITH_ENTROPY], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_a_second_derivative_is_an_error(backend, mixed, options):
    """Not a gradient without a graph, which a penalty on it would not move."""
    if mixed and options is WITH_ENTROPY:
        options = {"softcap": 2.0}
    problem = Problem(mixed=mixed, **options)
    inputs = {name: None if x is None else x.requires_grad_() for name, x in problem.inputs.items()}
    leaves = [x for x in inputs.values() if x is not None]
    loss = problem._call(backend, **inputs).sum()
    for gradient in torch.autograd.grad(loss, leaves, create_graph=True):
        for leaf in leaves:
            with pytest.raises(RuntimeError, match="differentia"):
                torch.autograd.grad(loss + gradient.square().sum(), leaf, retain_graph=True)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"reduction": "sum", "row_weight": True}], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_return_nll(mixed, options, backend):
    problem = Problem(mixed=mixed, ignored=(0,), **options)
    nlls = []

    def keep_nll(result):
        nlls.append(result[1])
        return result[0]

    inputs = {name: None if x is None else x.requires_grad_() for name, x in problem.inputs.items()}
    loss = keep_nll(problem._call(backend, **inputs, return_nll=True))
    assert torch.equal(loss, problem._call(backend, **inputs))
    every = problem.with_options(reduction="none")
    (nll,) = nlls
    assert not nll.requires_grad
    assert_as_accurate(nll, every.plain()["loss"], every.plain(torch.float64)["loss"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mixed", [False, True])
def test_each_subset_of_gradients(mixed, reduction, default_backend):
    names = [name for name in INPUTS[:4] if mixed or name in ("hidden", "weight")]
    problem = Problem(mixed=mixed, base_rows=5 if mixed else None, reduction=reduction)
    full = problem.ours(default_backend)
    for frozen in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1)):
        problem.frozen = frozen
        actual = problem.ours(default_backend)
        for name in names:
            got, expected = actual[f"d_{name}"], full[f"d_{name}"]
            assert got is None if name in frozen else torch.equal(got, expected), (name, frozen)


def count_work(monkeypatch):
    """Rows whose logits, and gradients of hidden and of weight, are asked of the chunk kernel."""
    work = Counter()
    for name in ("torch", "cpu"):
        module = BACKENDS[name].load()

        def solve_chunk(chunk, d_weight, needs_hidden, needs_weight, solve=module.solve_chunk):
            for wanted, needed in (("logits", True), ("d_hidden", needs_hidden), ("d_weight", needs_weight)):
                if needed:
                    work[wanted] += chunk.hidden.shape[0]
            result = solve(chunk, d_weight, needs_hidden, needs_weight)
            assert (result.d_hidden is not None) == needs_hidden
            return result

        monkeypatch.setattr(module, "solve_chunk", solve_chunk)
    return work


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (11, 11, 11)),
        ({"reduction": "none"}, (22, 11, 11)),
        ({"frozen": ("weight",)}, (11, 11, 0)),
        ({"frozen": ("hidden",)}, (11, 0, 11)),
        ({"frozen": ("hidden", "weight")}, (11, 0, 0)),
        ({"ignored": (0, 1, 5)}, (8, 8, 8)),
        ({"reduction": "none", "ignored": (0, 1, 5)}, (16, 8, 8)),
        ({"mixed": True}, (11, 11, 11)),
        ({"mixed": True, "frozen": ("hidden", "thought", "mixing")}, (11, 0, 11)),
    ],
    ids=str,
)
def test_no_needless_matmul(options, expected, monkeypatch, default_backend):
    work = count_work(monkeypatch)
    Problem(**options).ours(default_backend)
    assert (work["logits"], work["d_hidden"], work["d_weight"]) == expected


@pytest.mark.parametrize(("return_nll", "rows"), [(False, 4), (True, 11)])
def test_rows_of_weight_zero_cost_nothing(return_nll, rows, monkeypatch):
    work = count_work(monkeypatch)
    hidden, weight = torch.randn(11, 6, requires_grad=True), torch.randn(77, 6, requires_grad=True)
    row_weight = torch.zeros(11)
    row_weight[[0, 3, 4, 9]] = 1.0
    linear_cross_entropy(
        hidden, weight, torch.randint(77, (11,)), reduction="sum", row_weight=row_weight, return_nll=return_nll
    )
    assert work == {"logits": rows, "d_hidden": 4, "d_weight": 4}


def test_no_gradients_are_made_without_grad_mode(monkeypatch):
    work = count_work(monkeypatch)
    with torch.no_grad():
        linear_cross_entropy(torch.randn(5, 6, requires_grad=True), torch.randn(77, 6), torch.randint(77, (5,)))
    assert work == {"logits": 5}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mixed", [False, True])
def test_second_backward_and_second_run_are_bitwise_equal(mixed, reduction, default_backend):
    problem = Problem(mixed=mixed, base_rows=4 if mixed else None, reduction=reduction)
    inputs = {name: None if x is None else x.requires_grad_() for name, x in problem.inputs.items()}
    leaves = [x for x in inputs.values() if x is not None]
    loss = problem._call(default_backend, **inputs).sum() * 3
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    again = torch.autograd.grad(problem._call(default_backend, **inputs).sum() * 3, leaves)
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.usefixtures("default_backend")
def test_gradients_of_a_loss_that_is_not_scaled_can_be_made_again():
    """They are handed out as they were kept; who adds to them must add to a copy."""
    hidden, weight = torch.randn(5, 6, requires_grad=True), torch.randn(77, 6, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.randint(77, (5,)))
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    once = [x.clone() for x in once]
    for _ in range(3):
        loss.backward(retain_graph=True)
    for leaf, gradient in zip((hidden, weight), once, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * gradient)


def test_gradients_of_a_loss_that_is_not_scaled_are_not_copied():
    hidden, weight = torch.randn(5, 6, requires_grad=True), torch.randn(777, 6, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.randint(777, (5,)))
    allocated = largest_allocation(lambda: torch.autograd.grad(loss, (hidden, weight), retain_graph=True))
    assert allocated < hidden.nbytes
    assert largest_allocation(lambda: torch.autograd.grad(loss * 3, (hidden, weight))) >= weight.nbytes


@pytest.mark.parametrize(("rows", "most", "sizes"), [(10, 4, [4, 4, 2]), (9, 4, [3, 3, 3]), (4, 4, [4]), (0, 4, [])])
def test_chunks_are_about_even(rows, most, sizes):
    assert [part.stop - part.start for part in chunks._even_slices(rows, most)] == sizes


def test_small_gradients_of_a_mean_survive_float16():
    """Close to the smallest float16; with the loss scaled, as a gradient scaler does, nothing is lost."""
    problem = Problem(rows=3000, hidden_size=4, size=1e-3, dtype=torch.float16, grad=2.0**14)
    assert_problem_solved(problem, problem.ours("torch"))


def test_large_sums_in_a_mean_survive_float16():
    """The mean of d weight is small, the sum over the rows is beyond the largest float16."""
    problem = Problem(rows=3000, hidden_size=4, size=1e-3, dtype=torch.float16)
    problem.inputs["hidden"] += 64
    problem.target.zero_()
    assert_problem_solved(problem, problem.ours("torch"))


@pytest.mark.parametrize("mixed", [False, True])
def test_strides(mixed, default_backend):
    """Transposed, sliced and expanded inputs, and gradients of stride 0, give what contiguous ones give."""
    problem = Problem(mixed=mixed, reduction="none")
    expected = problem.ours(default_backend)
    problem.target = torch.stack([problem.target] * 2, dim=1)[:, 0]
    for name, x in problem.inputs.items():
        if x is not None:
            problem.inputs[name] = torch.stack([x.t() if x.dim() == 2 else x] * 2, dim=-1)[..., 0]
            problem.inputs[name] = problem.inputs[name].t() if x.dim() == 2 else problem.inputs[name]
            assert not problem.inputs[name].is_contiguous()
    for name, value in problem.ours(default_backend).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"reduction": "sum", "row_weight": True}], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        {"temperature": 2.0, "suppress": (1,)},
        {"softcap": 1.5, "temperature": 0.5, "suppress": (1,)},
        {"mixed": True, "base_rows": 3},
        {"mixed": True, "temperature": 2.0, "softcap": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ANY_DTYPE)
def test_gradcheck(backend, case, options):
    problem = Problem(rows=4, hidden_size=3, vocabulary=7, dtype=torch.float64, ignored=(1,), **case, **options)
    names = [name for name, x in problem.inputs.items() if x is not None]
    leaves = [problem.inputs[name].requires_grad_() for name in names]
    missing = {name: None for name in INPUTS if name not in names}
    assert torch.autograd.gradcheck(
        lambda *values: problem._call(backend, **dict(zip(names, values, strict=True)), **missing), leaves
    )


def test_mixing_weight_may_be_float32(default_backend):
    problem = Problem(mixed=True, dtype=torch.bfloat16)
    problem.inputs["mixing"] = problem.inputs["mixing"].float()
    actual = problem.ours(default_backend)
    assert actual["d_mixing"].dtype == torch.float32
    problem.inputs["mixing"] = problem.inputs["mixing"].bfloat16()
    eager, oracle = problem.plain(), problem.plain(torch.float64)
    assert_as_accurate(actual["loss"], eager["loss"], oracle["loss"])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("backend", ALL)
def test_autocast(backend, mixed):
    problem = Problem(mixed=mixed)
    call = problem._call

    def call_in_autocast(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return call(*args, **kwargs)

    problem._call = call_in_autocast
    actual = problem.ours(backend)
    problem._call = call
    low = Problem.__new__(Problem)
    low.__dict__.update(problem.__dict__)
    low.inputs = {k: x if k == "mixing" or x is None else x.bfloat16() for k, x in problem.inputs.items()}
    for name, value in low.ours(backend).items():
        assert torch.equal(actual[name], value.to(actual[name].dtype)), name
        assert actual[name].dtype == torch.float32


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ALL)
def test_compile(backend, reduction, mixed):
    problem = Problem(mixed=mixed, base_rows=4 if mixed else None, ignored=(2,), reduction=reduction)
    expected = problem.ours(backend)
    torch._dynamo.reset()
    compiled = torch.compile(problem._call, fullgraph=True, backend="aot_eager")
    problem._call = compiled
    for name, value in problem.ours(backend).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.usefixtures("default_backend")
def test_compiled_wrong_target_gives_nan():
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    loss, nll, entropy = compiled(
        hidden, weight, torch.tensor([0, 5, -100]), return_nll=True, return_entropy=True
    )  # fmt: skip
    assert loss.isnan()
    assert nll.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    assert entropy[2] == nll[2] == 0


@pytest.mark.parametrize("needs", [[True] * 4, [False] * 4, [True, False, False, True]])
def test_opcheck(needs, default_backend):
    hidden, thought, weight = torch.randn(5, 4), torch.randn(6, 4), torch.randn(7, 4)
    target, index = torch.randint(7, (6,)), torch.randint(5, (6,))
    operation = torch.ops.quietstar.linear_cross_entropy.default
    mixed = any(needs[1:3])
    arguments = (
        (hidden, thought, torch.randn(6), index, weight, 0.7, None, None, target, torch.rand(6), None, False)
        if mixed
        else (
            hidden,
            None,
            None,
            None,
            weight,
            0.7,
            2.0,
            torch.tensor([3]),
            target[:5],
            torch.rand(5),
            torch.rand(5),
            True,
        )
    )
    torch.library.opcheck(operation, (*arguments, True, needs, default_backend))
    torch.library.opcheck(
        torch.ops.quietstar.scaled_gradient.default, (hidden.bfloat16(), torch.tensor(0.3), torch.float16)
    )


@pytest.mark.usefixtures("default_backend")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_memory(reduction, monkeypatch):
    """Beyond inputs and gradients there is one chunk of logits and at most 5 % of it all."""
    chunk = 4 << 20
    monkeypatch.setitem(_rows.CHUNK_BYTES, "cpu", chunk)
    monkeypatch.setitem(_rows.BLOCK_BYTES, "cpu", chunk // 16)
    rows, hidden_size, vocabulary = 1024, 64, 8000
    hidden, weight = torch.randn(rows, hidden_size, requires_grad=True), torch.randn(vocabulary, hidden_size)
    weight.requires_grad_()
    target = torch.randint(vocabulary, (rows,))
    inputs = 4 * (hidden.numel() + weight.numel()) + 8 * rows
    gradients = 4 * (hidden.numel() + weight.numel())

    def step():
        linear_cross_entropy(hidden, weight, target, reduction=reduction).sum().backward()

    step()
    hidden.grad = weight.grad = None
    monkeypatch.setattr(_rows, "_workspace", _rows._Workspace())  # the chunk kept from before counts as well
    peak = peak_bytes(step)
    assert peak >= gradients + chunk * 0.9, "the measurement misses something"
    assert peak <= gradients + chunk + 0.05 * (inputs + gradients + chunk)
