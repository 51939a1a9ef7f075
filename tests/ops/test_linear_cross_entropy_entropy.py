"""The entropy of the linear cross-entropy: returned, weighed in its sum, and its gradients."""

import math

import pytest
import torch
from backends import ALL, ANY_DTYPE, FAST, with_dtypes
from cross_entropy_problem import INPUTS, Problem
from tolerances import assert_as_accurate

from quietstar.ops import _rows, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WITH_ENTROPY = {"reduction": "sum", "entropy_weight": True, "softcap": 2.0, "suppress": (1, 70), "temperature": 0.7}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Room for three rows of a vocabulary of 77 in a chunk and for two in a block."""
    monkeypatch.setitem(_rows.CHUNK_BYTES, "cpu", 3 * 77 * 4)
    monkeypatch.setitem(_rows.BLOCK_BYTES, "cpu", 2 * 77 * 4)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, WITH_ENTROPY], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), with_dtypes([torch.float32, torch.bfloat16]))
def test_return_entropy(backend, dtype, options):
    """That of the distribution the nll is of, whatever is done with it; 0 in rows that are ignored."""
    problem = Problem(ignored=(0,), dtype=dtype, **options)
    inputs = {name: None if x is None else x.requires_grad_() for name, x in problem.inputs.items()}
    loss, nll, entropy = problem._call(backend, **inputs, return_nll=True, return_entropy=True)
    assert torch.equal(loss, problem._call(backend, **inputs))
    assert torch.equal(nll, problem._call(backend, **inputs, return_nll=True)[1])
    assert torch.equal(entropy, problem._call(backend, **inputs, return_entropy=True)[1])
    assert not entropy.requires_grad
    assert entropy[0] == 0
    kept = {name: value for name, value in problem.options.items() if name in ("softcap", "suppress", "temperature")}
    plain = problem.with_options(reduction="entropy", **kept)
    assert_as_accurate(entropy, plain.plain()["loss"], plain.plain(torch.float64)["loss"])


@pytest.mark.parametrize("backend", ALL)
def test_entropy_of_known_distributions(backend):
    """Of equal tokens log V, of a certain one 0; a suppressed token adds nothing."""
    hidden, weight = torch.tensor([[0.0], [1.0]]), torch.tensor([[500.0], [0.0], [0.0], [0.0]])
    _, entropy = linear_cross_entropy(
        hidden, weight, torch.tensor([0, 0]), suppress=(2,), return_entropy=True, backend=backend
    )
    torch.testing.assert_close(entropy, torch.tensor([math.log(3), 0.0]))


@pytest.mark.parametrize("backend", ALL)
def test_an_infinite_logit_is_not_capped(backend):
    """A token of probability 0 stays one, and has no part in entropy and gradients."""
    weight = torch.randn(77, 1)
    expected = linear_cross_entropy(
        torch.ones(2, 1), weight, torch.tensor([3, 4]), softcap=2.0, suppress=(5,), return_entropy=True, backend=backend
    )
    weight[5] = -torch.inf
    hidden = torch.ones(2, 1, requires_grad=True)
    actual = linear_cross_entropy(
        hidden, weight, torch.tensor([3, 4]), softcap=2.0, return_entropy=True, backend=backend
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), b)


@pytest.mark.parametrize("backend", FAST)
def test_entropy_is_compiled_and_made_again_bit_by_bit(backend):
    problem = Problem(ignored=(2,), row_weight=True, **WITH_ENTROPY)
    expected = problem.ours(backend)
    assert all(map(torch.equal, problem.ours(backend).values(), expected.values()))
    torch._dynamo.reset()
    problem._call = torch.compile(problem._call, fullgraph=True, backend="aot_eager")
    for name, value in problem.ours(backend).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("backend", ANY_DTYPE)
@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"suppress": (1, 5), "temperature": 0.4, "row_weight": True}])
def test_entropy_in_float64(options, backend):
    """To 1e-6, and its gradients by differences."""
    problem = Problem(
        rows=4, hidden_size=3, vocabulary=7, dtype=torch.float64, ignored=(1,), reduction="sum", entropy_weight=True,
        **options,
    )  # fmt: skip
    for name, value in problem.ours(backend).items():
        torch.testing.assert_close(value, problem.plain()[name], rtol=1e-6, atol=1e-6)
    names = [name for name, x in problem.inputs.items() if x is not None]
    missing = dict.fromkeys(set(INPUTS) - set(names))
    assert torch.autograd.gradcheck(
        lambda *values: problem._call(backend, **dict(zip(names, values, strict=True)), **missing),
        [problem.inputs[name].requires_grad_() for name in names],
    )
