"""Away from the CPU the vocabulary ops neither read a value nor copy from the host, so CUDA graphs can capture them.

On the meta device tensors have shapes but no values: whatever needs one fails. Triton's kernels are not launched.
"""

import pytest
import torch
from waiting import NothingFromTheHost, launch_nothing

from quietstar.ops import (
    linear_cross_entropy,
    linear_sample,
    mix_logits,
    mixed_cross_entropy,
    mixed_linear_cross_entropy,
)
from quietstar.ops._checks import CHECK_VALUES_VARIABLE
from quietstar.ops.linear_cross_entropy import autograd as linear_autograd
from quietstar.ops.linear_sample import api as sample_api
from quietstar.ops.linear_sample import registration
from quietstar.ops.mixing import library as mixing_library

ROWS, SIZE, VOCABULARY = 200, 8, 300
MIXING = {"torch": mixing_library}


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """Its own code instead of the ops' shape functions, which is what meta tensors are for otherwise."""
    if request.param == "triton":
        launch_nothing(monkeypatch)
        MIXING["triton"] = pytest.importorskip("quietstar.ops.mixing.triton_kernels")
    monkeypatch.setattr(linear_autograd, "_cross_entropy_op", linear_autograd._cross_entropy)
    monkeypatch.setattr(linear_autograd, "_scaled_gradient_op", linear_autograd._scaled_gradient)
    monkeypatch.setattr(sample_api, "linear_sample_op", registration._linear_sample)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no meta device
    with NothingFromTheHost(), torch.device("meta"):
        yield request.param


def random(*shape):
    return torch.randn(shape, dtype=torch.float16, requires_grad=True)


def numbers(high, *shape):
    return torch.randint(high, shape)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"reduction": "sum", "return_nll": True}], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_linear_cross_entropies(mixed, options, backend):
    options = options | {"backend": backend}
    if options.get("reduction") == "sum":
        options["row_weight"] = random(ROWS)
    weight, target = random(VOCABULARY, SIZE), numbers(VOCABULARY, ROWS)
    if mixed:
        hidden, options["base_index"] = (random(50, SIZE), random(ROWS, SIZE), random(ROWS)), numbers(50, ROWS)
        result = mixed_linear_cross_entropy(*hidden, weight, target, **options)
    else:
        hidden = (random(ROWS, SIZE),)
        result = linear_cross_entropy(*hidden, weight, target, temperature=3.0, suppress=(1, 2), **options)
    loss = result[0] if isinstance(result, tuple) else result
    gradients = torch.autograd.grad(loss.sum(), (*hidden, weight))
    assert [x.shape for x in gradients] == [x.shape for x in (*hidden, weight)]


@pytest.mark.parametrize("rows", [5, ROWS])  # in Triton's matmul, and after it
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 5, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("suppress", [None, (1, 2), "tensor"])
@pytest.mark.parametrize("seed", [3, "tensor", "on the CPU"])
def test_linear_sample(seed, suppress, options, rows, backend):
    if seed != 3:
        seed = torch.zeros((), dtype=torch.int64, device="cpu" if seed == "on the CPU" else "meta")
    suppress = numbers(VOCABULARY, 2) if suppress == "tensor" else suppress
    tokens = linear_sample(
        random(rows, SIZE), random(VOCABULARY, SIZE), seed=seed, suppress=suppress, backend=backend, **options
    )
    assert tokens.shape == (rows,)


def test_mixing(backend):
    """The functions of the backend; those of the ops around them are next."""
    base, thought, weight, target = random(ROWS, VOCABULARY), random(ROWS, VOCABULARY), random(ROWS), numbers(9, ROWS)
    kernels = MIXING[backend]
    with torch.no_grad():
        kernels.mix(base, thought, weight)
        kernels.mix_backward(base, base, thought, weight, [True] * 3)
        nll, _, largest, log_total = kernels.cross_entropy(base, thought, weight, target)
        kernels.cross_entropy_backward(nll, base, thought, weight, target, largest, log_total, [True] * 2)


def test_values_are_read_where_that_is_asked_for(backend, monkeypatch):
    """``QUIETSTAR_CHECK_VALUES`` finds wrong targets on a GPU too, and waits for them."""
    monkeypatch.setenv(CHECK_VALUES_VARIABLE, "1")
    with pytest.raises(RuntimeError, match="meta tensor"):
        linear_cross_entropy(random(ROWS, SIZE), random(VOCABULARY, SIZE), numbers(VOCABULARY, ROWS), backend=backend)


def test_checks_of_mixing(backend):
    leaves, target = (random(ROWS, VOCABULARY), random(ROWS, VOCABULARY), random(ROWS)), numbers(VOCABULARY, ROWS)
    loss = mixed_cross_entropy(*leaves, target, backend=backend) + mix_logits(*leaves, backend=backend).mean()
    assert [x.shape for x in torch.autograd.grad(loss, leaves)] == [x.shape for x in leaves]
