"""On a GPU the vocabulary ops neither read a value nor copy from the host, so CUDA graphs can capture them.

The GPU is a pretended one (``pretended_gpu``), and no kernel is launched.
"""

import itertools

import pytest
import torch
from pretended_gpu import DEVICE, nothing_waits

from quietstar.ops import (
    linear_cross_entropy,
    linear_sample,
    mix_logits,
    mixed_cross_entropy,
    mixed_linear_cross_entropy,
)
from quietstar.ops._checks import CHECK_VALUES_VARIABLE

ROWS, SIZE, VOCABULARY = 200, 8, 300

every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)


def random(*shape, dtype=torch.float16):
    return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)


def numbers(high, *shape):
    return torch.randint(high, shape, device=DEVICE)


def assert_gradients_of(leaves, loss):
    gradients = torch.autograd.grad(loss, leaves)
    assert [(x.shape, x.dtype, x.device) for x in gradients] == [(x.shape, x.dtype, x.device) for x in leaves]


ENTROPY = {"reduction": "sum", "return_entropy": True, "softcap": 3.0}


@every_dtype
@pytest.mark.parametrize(
    ("mixed", "options"),
    [
        *itertools.product(
            [False, True],
            [{}, {"reduction": "none"}, {"reduction": "sum", "return_nll": True}, {"softcap": 2.0, "temperature": 0.5}],
        ),
        (False, ENTROPY | {"entropy_weight": 0.1}),
        (False, ENTROPY | {"entropy_weight": "tensor"}),
    ],
    ids=str,
)
def test_linear_cross_entropies(mixed, options, dtype, gpu_backend):
    options = options | {"backend": gpu_backend}
    if options.get("reduction") == "sum":
        options["row_weight"] = random(ROWS, dtype=dtype)
    if options.get("entropy_weight") == "tensor":
        options["entropy_weight"] = random(ROWS, dtype=dtype)
    hidden = [random(ROWS, SIZE, dtype=dtype)]
    if mixed:
        hidden = [random(50, SIZE, dtype=dtype), *hidden, random(ROWS, dtype=torch.float32)]
        options["base_index"] = numbers(50, ROWS)
    else:
        options = {"temperature": 3.0, "suppress": (1, 2), **options}
    weight, target = random(VOCABULARY, SIZE, dtype=dtype), numbers(VOCABULARY, ROWS)
    with nothing_waits():
        result = (mixed_linear_cross_entropy if mixed else linear_cross_entropy)(*hidden, weight, target, **options)
        loss, *rows = result if isinstance(result, tuple) else (result,)
        assert [(x.shape, x.dtype, x.device) for x in rows] == [((ROWS,), torch.float32, DEVICE)] * len(rows)
        assert (loss.shape, loss.dtype) == ((ROWS,) if options.get("reduction") == "none" else (), torch.float32)
        assert_gradients_of([*hidden, weight], loss.sum())


@pytest.mark.parametrize("rows", [5, ROWS])  # in Triton's matmul, and after it
@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"temperature": 0}, {"top_k": 5, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize(("seed", "suppress"), [(3, (1, 2)), ("tensor", "tensor"), ("on the CPU", None)], ids=str)
def test_linear_sample(seed, suppress, options, rows, gpu_backend):
    if seed != 3:
        seed = torch.zeros((), dtype=torch.int64, device="cpu" if seed == "on the CPU" else DEVICE)
    suppress = numbers(VOCABULARY, 2) if suppress == "tensor" else suppress
    hidden, weight = random(rows, SIZE), random(VOCABULARY, SIZE)
    with nothing_waits():
        tokens = linear_sample(hidden, weight, seed=seed, suppress=suppress, backend=gpu_backend, **options)
    assert (tokens.shape, tokens.dtype, tokens.device) == ((rows,), torch.int64, DEVICE)


@every_dtype
@pytest.mark.parametrize("needed", [(0, 1, 2), (0,), (1, 2)], ids=str)
def test_mixing(needed, dtype, gpu_backend):
    leaves = random(4, 50, VOCABULARY, dtype=dtype), random(4, 50, VOCABULARY, dtype=dtype), random(4, 50, dtype=dtype)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in needed)
    target = numbers(VOCABULARY, 4, 50)
    with nothing_waits():
        mixed = mix_logits(*leaves, backend=gpu_backend)
        assert (mixed.shape, mixed.dtype, mixed.device) == (leaves[0].shape, dtype, DEVICE)
        loss = mixed_cross_entropy(*leaves, target, backend=gpu_backend) + mixed.mean()
        assert_gradients_of([leaves[i] for i in needed], loss)


def test_values_are_read_where_that_is_asked_for(gpu_backend, monkeypatch):
    """``QUIETSTAR_CHECK_VALUES`` finds wrong targets on a GPU too, and waits for them."""
    monkeypatch.setenv(CHECK_VALUES_VARIABLE, "1")
    arguments = random(ROWS, SIZE), random(VOCABULARY, SIZE), numbers(VOCABULARY, ROWS)
    with nothing_waits(), pytest.raises(AssertionError, match="waits for the GPU"):
        linear_cross_entropy(*arguments, backend=gpu_backend)
