"""The CUDA kernels of the vocabulary ops: on a GPU if there is one, else compiled for the CPU (tests/simt.py)."""

import pytest
import simt
import torch
import torch.nn.functional as F
from broken_rows import assert_broken_rows_have_no_token
from cross_entropy_problem import (
    CASES,
    Problem,
    assert_problem_solved,
    assert_rows_that_do_not_count_may_hold_anything,
    assert_stride_0_changes_nothing,
)
from impossible_tokens import assert_impossible_tokens_right
from simt import DEVICE
from tolerances import assert_as_accurate

from quietstar.ops import _rows, linear_cross_entropy, linear_sample, mix_logits, mixed_cross_entropy
from quietstar.ops._vocabulary import Softmax
from quietstar.ops.linear_cross_entropy import chunks
from quietstar.ops.linear_cross_entropy.inputs import Scales
from quietstar.ops.linear_sample.inputs import Sampling
from quietstar.ops.linear_sample.reference import keep_most_likely

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
INF = float("inf")


@pytest.fixture(autouse=True)
def shim(monkeypatch, poisoned_memory):
    """The module that stands in for the GPU, or None. Rows come in a few chunks, whether they count or not."""
    monkeypatch.setitem(_rows.CHUNK_BYTES, DEVICE, 4 * 77 * 4)
    monkeypatch.setattr(chunks, "_selected", lambda mask, step: _rows.slices(mask.shape[0], step))
    return simt.use_cuda_kernels(monkeypatch)


# Mixing.


def plain_mixing(function, base, thought, weight, target):
    """Result per row, by plain PyTorch."""
    mixed = (1 - weight[..., None]) * base + weight[..., None] * thought
    if function == "mix":
        return mixed
    mixed = mixed.to(torch.promote_types(mixed.dtype, torch.float32)).reshape(-1, mixed.shape[-1])
    return F.cross_entropy(mixed, target.flatten(), reduction="none").view(target.shape)


def our_mixing(function, base, thought, weight, target):
    if function == "mix":
        return mix_logits(base, thought, weight, backend="cuda")
    return mixed_cross_entropy(base, thought, weight, target, reduction="none", backend="cuda")


def result_and_gradients(call, function, inputs, target, incoming, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    result = call(function, *leaves, target)
    result.backward(incoming.to(result.dtype))
    return [result.detach(), *(x.grad for x in leaves)]


def mixing_inputs(leading, vocabulary, dtype, size=3.0):
    logits = (torch.randn(*leading, vocabulary, device=DEVICE).mul(size).to(dtype) for _ in range(2))
    return [*logits, torch.randn(leading, device=DEVICE).mul(2).to(dtype)]


def assert_mixing_right(function, inputs):
    target = torch.randint(inputs[0].shape[-1], inputs[2].shape, device=DEVICE)
    target.view(-1)[1:2] = -100
    incoming = torch.randn(inputs[0].shape if function == "mix" else target.shape, device=DEVICE)
    run = [
        result_and_gradients(call, function, inputs, target, incoming, dtype)
        for call, dtype in ((our_mixing, None), (plain_mixing, None), (plain_mixing, torch.float64))
    ]
    dtype = inputs[0].dtype
    ulps = 1 if function == "mix" else 1 + 7 * dtype.itemsize // 4
    for name, *values in zip(("result", "d_base", "d_thought", "d_mixing"), *run, strict=True):
        assert values[0].dtype == values[1].dtype
        assert_as_accurate(*values, unit=dtype, ulps=ulps, name=name)


both_functions = pytest.mark.parametrize("function", ["mix", "cross entropy"])


@both_functions
@every_dtype
@pytest.mark.parametrize(
    ("leading", "vocabulary", "size"),
    [((), 9, 3.0), ((3,), 1, 3.0), ((5,), 7, 3.0), ((2, 3), 77, 3.0), ((2,), 77, 1e3), ((3,), 32002, 3.0)],
)
def test_mixing(leading, vocabulary, size, dtype, function):
    assert_mixing_right(function, mixing_inputs(leading, vocabulary, dtype, size))


@both_functions
@pytest.mark.parametrize("vocabulary", [5, 3001])
@pytest.mark.parametrize("offsets", [(1, 1), (1, 0), (3, 5)])
def test_rows_that_begin_anywhere(offsets, vocabulary, function):
    """Rows of base and thought that begin alike modulo 16 bytes, or not, in tensors that are wider than the rows."""
    base, thought, weight = mixing_inputs((3,), vocabulary + 8, torch.bfloat16)
    base, thought = (x[:, i : i + vocabulary] for x, i in zip((base, thought), offsets, strict=True))
    assert_mixing_right(function, [base, thought, weight])


@both_functions
def test_strided_inputs_and_expanded_gradients(function):
    inputs = mixing_inputs((3, 4), 77, torch.float32)
    target = torch.randint(77, (3, 4), device=DEVICE)
    strided = [torch.stack([x, x], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0] for x in inputs]
    incoming = torch.tensor(0.5, device=DEVICE).expand(inputs[0].shape if function == "mix" else target.shape)
    expected = result_and_gradients(our_mixing, function, inputs, target, incoming.contiguous())
    for a, b in zip(result_and_gradients(our_mixing, function, strided, target, incoming), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@both_functions
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone(needs, function):
    inputs = mixing_inputs((5,), 77, torch.float32)
    target = torch.randint(77, (5,), device=DEVICE)
    incoming = torch.ones(inputs[0].shape if function == "mix" else (5,), device=DEVICE)
    full = result_and_gradients(our_mixing, function, inputs, target, incoming)[1:]
    leaves = [x.clone().requires_grad_(needed) for x, needed in zip(inputs, needs, strict=True)]
    our_mixing(function, *leaves, target).backward(incoming)
    for x, needed, gradient in zip(leaves, needs, full, strict=True):
        assert torch.equal(x.grad, gradient) if needed else x.grad is None


def test_ignored_rows_may_hold_anything():
    inputs, target = mixing_inputs((3,), 40, torch.float32), torch.tensor([-100, 3, -100], device=DEVICE)
    incoming = torch.ones(3, device=DEVICE)
    expected = result_and_gradients(our_mixing, "cross entropy", inputs, target, incoming)
    inputs[0][0], inputs[1][2, 5], inputs[2][0] = INF, float("nan"), float("nan")
    for a, b in zip(result_and_gradients(our_mixing, "cross entropy", inputs, target, incoming), expected, strict=True):
        assert torch.equal(a, b)


@both_functions
@every_dtype
def test_impossible_tokens(dtype, function):
    for vocabulary in (5, 1000):
        assert_impossible_tokens_right(function, "cuda", dtype, vocabulary, DEVICE)


# The linear cross-entropies.


@every_dtype
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_linear_cross_entropies(case, dtype):
    problem = Problem(dtype=dtype, device=DEVICE, **case)
    assert_problem_solved(problem, problem.ours("cuda"))


@pytest.mark.parametrize("mixed", [{}, {"mixed": True, "base_rows": 3}], ids=str)
def test_rows_that_do_not_count_may_hold_anything(mixed):
    for options in ({}, {"reduction": "none"}, {"reduction": "sum", "row_weight": True}):
        assert_rows_that_do_not_count_may_hold_anything("cuda", DEVICE, **mixed, **options)


def test_stride_0_changes_nothing():
    assert_stride_0_changes_nothing("cuda", DEVICE)


def plain_rows(logits, target, scale, temperature):
    logits = logits.detach().requires_grad_()
    nll = F.cross_entropy(logits / temperature, target, reduction="none")
    return nll.detach(), torch.autograd.grad((scale * nll).sum(), logits)[0]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("gradient_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 77, 1025, 32002, 50001])
def test_row_kernel(vocabulary, gradient_dtype, aligned):
    """Rows in registers and longer ones, with a gradient as wide as the logits it overwrites, half as wide, or none."""
    from quietstar.ops.linear_cross_entropy.backend_cuda import cross_entropy_rows

    width = -(-vocabulary // 64) * 64
    logits = torch.full((3, width if aligned else width + 1), float("nan"), device=DEVICE)[:, :vocabulary]
    logits.normal_(std=4)
    target = torch.randint(vocabulary, (3,), device=DEVICE)
    scale = torch.tensor([1.0, 0.0, -0.25], device=DEVICE)
    eager = plain_rows(logits, target, scale, 0.3)
    oracle = plain_rows(logits.double(), target, scale.double(), 0.3)
    if not aligned and gradient_dtype in (torch.bfloat16, torch.float16):
        logits = F.pad(logits, (0, 64 - vocabulary % 2))[:, :vocabulary]  # so that half the width fits the pitch
    scales = Scales(scale, None) if gradient_dtype else None
    nll, _, gradient = cross_entropy_rows(
        logits, Softmax(0.3, None, None), target, scales, False, gradient_dtype or torch.float32
    )
    assert_as_accurate(nll, eager[0], oracle[0])
    if gradient_dtype is None:
        assert gradient is None
    else:
        assert gradient.dtype == gradient_dtype
        assert_as_accurate(gradient, eager[1], oracle[1])


# Sampling.

OPTIONS = {
    "all": {},
    "cold": {"temperature": 0.4},
    "greedy": {"temperature": 0},
    "suppress": {"suppress": (0, 4)},
    "top_k": {"top_k": 3},
    "top_k of many": {"top_k": 60},
    "top_p": {"top_p": 0.8, "temperature": 1.5},
    "softcap": {"softcap": 1.5, "temperature": 0.4, "suppress": (0,)},
    "softcap, greedy": {"softcap": 1.5, "temperature": 0},
    "everything": {"suppress": (1,), "temperature": 0.7, "top_k": 5, "top_p": 0.9, "softcap": 4.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("vocabulary", "scale"), [(7, 1.0), (77, 0.02), (1000, 1.0), (32002, 0.5)])
def test_tokens(vocabulary, scale, options, monkeypatch):
    monkeypatch.setitem(_rows.CHUNK_BYTES, DEVICE, 3 * (vocabulary + 63) * 4)
    hidden, weight = torch.randn(8, 8, device=DEVICE), torch.randn(vocabulary, 8, device=DEVICE) * scale
    expected = linear_sample(hidden, weight, seed=5, backend="reference", **options)
    tokens = linear_sample(hidden, weight, seed=5, backend="cuda", **options)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, expected)


def test_seed_and_row_number_of_64_bits():
    from quietstar.ops.linear_sample import backend_cuda, backend_torch

    logits = torch.zeros(4, 1024, device=DEVICE)
    for seed, first_row in ((-7, 2**32 - 2), (5 << 32, 0), (2**63 - 1, 2**40)):
        arguments = first_row, Sampling(torch.tensor(seed, device=DEVICE), 1.0, None, None, None, None)
        tokens = backend_cuda.sample_rows(logits.clone(), *arguments)
        assert torch.equal(tokens, backend_torch.sample_rows(logits.clone(), *arguments))


EDGES = [  # logits, top_k, top_p, tokens that stay
    ([4.0, 2.0, 2.0, 1.0, 1.0], 2, None, [0, 1, 2]),
    ([0.0, -0.7, -0.7, -1.4, -1.4], None, 0.5, [0, 1, 2]),
    ([-0.0, 0.0, -1.0, -1.0], 1, None, [0, 1]),
    ([-2.0, -1.0, -1.5, -INF], 3, None, [0, 1, 2]),
    ([-INF, 1.0, 1.0, 1.0], 4, None, [1, 2, 3]),
    ([1.0, 2.0, 3.0], None, 1e-6, [2]),
    ([1.0, 1.5, -3.0, 1.25], 2, 0.99, [1, 3]),
]


@pytest.mark.parametrize(("logits", "top_k", "top_p", "kept"), EDGES)
def test_who_stays_with_top_k_and_top_p(logits, top_k, top_p, kept):
    """Ties at the edge stay, the two zeros are one number, suppressed tokens count for nothing."""
    weight = torch.tensor(logits, device=DEVICE)[:, None]
    hidden = torch.ones(60, 1, device=DEVICE)
    tokens = linear_sample(hidden, weight, top_k=top_k, top_p=top_p, temperature=3.0, seed=3, backend="cuda")
    # The temperature changes what top_p keeps, so that is compared with the specification.
    if top_p is not None:
        stays = keep_most_likely(weight.t(), 3.0, top_k, top_p)[0] > -INF
        kept = stays.nonzero()[:, 0].tolist()
    assert tokens.unique().tolist() == kept


def test_more_candidates_than_shared_memory_holds():
    hidden, weight = torch.ones(4, 1, device=DEVICE), torch.randn(9000, 1, device=DEVICE) * 0.01
    for options in ({"top_k": 5000}, {"top_p": 0.7}, {"top_k": 6000, "top_p": 0.9}):
        expected = linear_sample(hidden, weight, seed=5, backend="reference", **options)
        assert torch.equal(linear_sample(hidden, weight, seed=5, backend="cuda", **options), expected)


def test_a_lone_token_wins():
    hidden, weight = torch.ones(9, 1, device=DEVICE), torch.full((300, 1), -80.0, device=DEVICE)
    suppress = [token for token in range(300) if token != 257]
    assert (linear_sample(hidden, weight, suppress=suppress, seed=1, backend="cuda") == 257).all()


def test_rows_from_which_no_token_can_be_drawn():
    from quietstar.ops.linear_sample.backend_cuda import sample_rows

    assert_broken_rows_have_no_token(sample_rows, DEVICE)


# All of them.


def test_no_rows():
    base, thought, weight = mixing_inputs((0,), 9, torch.float32)
    assert mix_logits(base, thought, weight, backend="cuda").shape == (0, 9)
    assert linear_sample(torch.randn(0, 4, device=DEVICE), base.new_ones(9, 4), seed=1, backend="cuda").shape == (0,)
    target = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert linear_cross_entropy(base.new_ones(0, 4), base.new_ones(9, 4), target, backend="cuda") == 0


@pytest.mark.parametrize("op", ["cross entropy", "linear", "sample"])
def test_the_order_of_threads_changes_nothing(op, shim):
    logits, weight = mixing_inputs((3,), 5000, torch.bfloat16)[::2]
    target = torch.randint(5000, (3,), device=DEVICE)

    def run():
        if op == "cross entropy":
            return mixed_cross_entropy(logits, logits.flip(0), weight, target, reduction="none", backend="cuda")
        head = logits.float()[:, :8].t()
        if op == "linear":
            return linear_cross_entropy(head, head.flip(0), target[:1].expand(8) % 8, backend="cuda")
        return linear_sample(logits.float(), logits.float(), seed=3, top_p=0.9, backend="cuda")

    expected = run()
    for seed in range(1, 4):
        if shim is not None:
            shim.set_random_seed(seed)
        assert torch.equal(run(), expected)
