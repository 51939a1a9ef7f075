"""linear_sample in Triton kernels gives the specification's tokens: on a GPU, or else in Triton's interpreter.

`pytest --emulate sm_90` compiles them and emulates the GPU: docs/testing_kernels.md.
"""

import math

import pytest
import torch
from backends import triton_dtypes
from broken_rows import OPTIONS as OPTIONS_OF_BROKEN_ROWS
from broken_rows import assert_broken_rows_have_no_token

from quietstar.ops import _rows, linear_sample
from quietstar.ops.linear_sample import noise
from quietstar.ops.linear_sample.inputs import Sampling
from quietstar.ops.linear_sample.reference import keep_most_likely

triton = pytest.importorskip("triton")
backend_triton = pytest.importorskip("quietstar.ops.linear_sample.backend_triton")
triton_rows = pytest.importorskip("quietstar.ops.linear_sample.triton_rows")
triton_noise = pytest.importorskip("quietstar.ops.linear_sample.triton_noise")
tl = triton.language
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # By the interpreter, in lanes that are not chosen.
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = triton_dtypes()


@pytest.fixture(params=["matmul", "rows"])
def kernels(request, monkeypatch):
    """Sampling in the epilogue of the matmul, or in a row kernel as for many rows, in chunks."""
    if request.param == "rows":
        monkeypatch.setattr(backend_triton, "MOST_ROWS", 0)
        monkeypatch.setitem(_rows.CHUNK_BYTES, DEVICE, 5 * 128 * 4)
    return request.param


@triton.jit
def arrivals_kernel(rows, seed, times, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    row, token = tl.arange(0, ROWS), tl.arange(0, GROUPS * 64)
    drawn = triton_noise.arrivals(tl.load(seed), tl.load(rows + row), 2, GROUPS)
    tl.store(times + row[None, :] * GROUPS * 64 + token[:, None], drawn)


@pytest.mark.parametrize("seed", [0, 12345, -7, 2**63 - 1, 5 << 32])
def test_noise_is_the_same(seed):
    rows, seed = torch.tensor([0, 1, 2**32 - 1, 2**40 + 3], device=DEVICE), torch.tensor(seed, device=DEVICE)
    first, places = noise.first_arrivals(seed, rows, 4)
    groups = torch.tensor([2, 3], device=DEVICE).expand(4, 2)
    expected = noise.arrivals(seed, rows[:, None], groups, first[:, 2:], places[:, 2:]).flatten(1)
    times = torch.empty_like(expected)
    arrivals_kernel[(1,)](rows, seed, times, GROUPS=2, ROWS=4)
    torch.testing.assert_close(times, expected, rtol=1e-6, atol=0)


def test_extreme_words_give_finite_noise():
    """Where 1 − u rounds to 1, and where it is smallest."""
    words = torch.tensor([0, 1, 2**7, 2**8, 2**9, 2**24, 2**31, 2**32 - 256, 2**32 - 1], device=DEVICE)
    words = torch.cat([words, words.new_zeros(7)])
    times = torch.empty(16, device=DEVICE)
    exponential_kernel[(1,)](words, times)
    torch.testing.assert_close(times, noise.exponential_(words.float()), rtol=1e-6, atol=0)


@triton.jit
def exponential_kernel(words, times):
    place = tl.arange(0, 16)
    tl.store(times + place, triton_noise.exponential(tl.load(words + place).to(tl.uint32)))


def assert_same_tokens(hidden, weight, **options):
    expected = linear_sample(hidden, weight, seed=5, backend="reference", **options)
    tokens = linear_sample(hidden, weight, seed=5, backend="triton", **options)
    assert tokens.dtype == torch.int64
    assert (tokens == expected).float().mean() >= 0.999


OPTIONS = {
    "all": {},
    "cold": {"temperature": 0.4},
    "greedy": {"temperature": 0},
    "suppress": {"suppress": (0, 4)},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8, "temperature": 1.5},
    "softcap": {"softcap": 1.5, "temperature": 0.4},
    "softcap, greedy": {"softcap": 1.5, "temperature": 0},
    "everything": {"suppress": (1,), "temperature": 0.7, "top_k": 5, "top_p": 0.9, "softcap": 4.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("vocabulary", "scale"), [(77, 0.02), (1000, 1.0)])
def test_tokens(vocabulary, scale, options, kernels):
    hidden, weight = torch.randn(3, 8, device=DEVICE), torch.randn(vocabulary, 8, device=DEVICE) * scale
    assert_same_tokens(hidden, weight, **options)


def test_tokens_of_a_large_vocabulary(monkeypatch):
    monkeypatch.setattr(backend_triton, "MOST_ROWS", 0)
    hidden, weight = torch.randn(5, 8, device=DEVICE), torch.randn(32002, 8, device=DEVICE) * 0.3
    assert_same_tokens(hidden, weight, temperature=0.8, suppress=(32000, 32001))


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 100, 128, 129])
def test_rows_of_every_tile(rows):
    assert_same_tokens(torch.randn(rows, 8, device=DEVICE), torch.randn(200, 8, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [1, 128, 150])
def test_dtypes_hidden_sizes_and_strides(hidden_size, dtype, kernels):
    hidden, weight = (torch.randn(hidden_size, n, device=DEVICE).to(dtype).t() for n in (9, 150))
    assert_same_tokens(hidden, weight * hidden_size**-0.5)
    assert_same_tokens(hidden[::2], weight[::2] * hidden_size**-0.5)


def test_greedy_takes_the_lowest_id_on_ties(kernels):
    weight = torch.zeros(1000, 1, device=DEVICE)
    weight[[130, 131, 700]] = 1
    tokens = linear_sample(torch.ones(3, 1, device=DEVICE), weight, temperature=0, seed=3, backend="triton")
    assert tokens.tolist() == [130] * 3


INF = math.inf
EDGES = [  # logits, top_k, top_p, tokens that stay
    ([4.0, 2.0, 2.0, 1.0, 1.0], 2, None, [0, 1, 2]),
    ([0.0, -0.7, -0.7, -1.4, -1.4], None, 0.5, [0, 1, 2]),
    ([-0.0, 0.0, -1.0, -1.0], 1, None, [0, 1]),
    ([-2.0, -1.0, -1.5, -INF], 3, None, [0, 1, 2]),
    ([-INF, 1.0, 1.0, 1.0], 4, None, [0, 1, 2, 3]),
    ([1.0, 2.0, 3.0], None, 1e-6, [2]),
    ([1.0, 1.5, -3.0, 1.25], 2, 0.99, [1, 3]),
]


@pytest.mark.parametrize(("logits", "top_k", "top_p", "kept"), EDGES)
def test_who_stays_with_top_k_and_top_p(logits, top_k, top_p, kept):
    """Ties at the edge stay, the two zeros are one number, suppressed tokens count for nothing."""
    row = torch.full((64,), -INF, device=DEVICE)
    row[: len(logits)] = torch.tensor(logits)
    stays = kept_of(row[None], 1.0, top_k, top_p, places=32)[0]
    assert stays.nonzero()[: len(kept), 0].tolist() == kept
    assert (stays & (row > -INF)).sum() == (row[kept] > -INF).sum()


def kept_of(logits, temperature, top_k, top_p, places):
    """Which logits reach the thresholds of their rows."""
    rows, size = logits.shape
    thresholds, candidates = torch.empty(rows, device=DEVICE), torch.empty(rows, places, device=DEVICE)
    triton_rows.threshold_kernel[(rows,)](
        logits, candidates, thresholds, size, temperature, top_k, top_p, BLOCK=places, enable_fp_fusion=False
    )
    return logits >= thresholds[:, None]


ROWS = {
    "normal": lambda x: x * 3,
    "flat": lambda x: x * 0.01,
    "ties": lambda x: (x * 2).round() / 2,
    "all equal": lambda x: x * 0 + 1.5,
    "one far away": lambda x: x.index_fill(1, torch.tensor([77], device=DEVICE), 100.0),
    "mostly -inf": lambda x: x.where(x > 1, -INF),
    "in order": lambda x: x.sort(dim=1).values * 2,
    "tiny": lambda x: x * 1e-30,
    "all negative": lambda x: -x.abs() - 50,
}


@pytest.mark.parametrize("make", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("options", [(20, None), (200, None), (None, 0.7), (20, 0.7), (200, 0.7)], ids=str)
def test_thresholds(options, make):
    """With as few places and candidates that brackets have to be narrowed."""
    logits = make(torch.randn(1, 512, device=DEVICE))
    expected = keep_most_likely(logits.double(), 0.8, *options) > -INF
    stays = kept_of(logits, 0.8, *options, places=32)
    assert torch.equal(stays & (logits > -INF), expected)


def test_a_lone_token_wins_however_unlikely_its_noise(kernels):
    hidden, weight = torch.ones(9, 1, device=DEVICE), torch.full((300, 1), -80.0, device=DEVICE)
    suppress = [token for token in range(300) if token != 257]
    assert (linear_sample(hidden, weight, suppress=suppress, seed=1, backend="triton") == 257).all()


def test_rows_from_which_no_token_can_be_drawn():
    assert_broken_rows_have_no_token(triton_rows.sample_rows, DEVICE, OPTIONS_OF_BROKEN_ROWS[:3])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_broken_rows_in_the_epilogue_of_the_matmul(temperature, softcap):
    hidden, weight = torch.ones(6, 1, device=DEVICE), torch.rand(300, 1, device=DEVICE) + 1
    hidden[1], hidden[2], hidden[3] = math.nan, INF, -INF
    weight[70] = -INF  # so that row 3 has +∞ too
    seed, suppress = torch.tensor(3, device=DEVICE), torch.tensor([5], device=DEVICE)
    sampling = Sampling(seed, temperature, softcap, suppress, None, None)
    tokens = backend_triton.sample(hidden, weight, sampling)
    assert (tokens == -1).tolist() == [False, True, True, True, False, False]
    hidden[3] = -INF
    weight[70] = 1.0
    tokens = backend_triton.sample(hidden, weight, sampling)
    assert (tokens == -1).tolist() == [False, True, True, True, False, False]
    weight[5] = math.nan
    assert torch.equal(backend_triton.sample(hidden, weight, sampling), tokens)


def test_seed_may_be_a_tensor(kernels):
    hidden, weight = torch.ones(10, 1, device=DEVICE), torch.zeros(100, 1, device=DEVICE)
    first = linear_sample(hidden, weight, seed=3, backend="triton")
    assert torch.equal(first, linear_sample(hidden, weight, seed=torch.tensor(3), backend="triton"))
    assert torch.equal(first, linear_sample(hidden, weight, seed=torch.tensor(3, device=DEVICE), backend="triton"))
    assert not torch.equal(first, linear_sample(hidden, weight, seed=4, backend="triton"))


def test_no_rows():
    assert linear_sample(torch.randn(0, 4), torch.randn(9, 4), seed=1, backend="triton").shape == (0,)


def test_compile(kernels):
    hidden, weight = torch.randn(4, 8, device=DEVICE), torch.randn(100, 8, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(linear_sample, fullgraph=True, backend="aot_eager")
    for seed in (1, torch.tensor(3)):
        options = {"seed": seed, "suppress": (3,), "backend": "triton"}
        assert torch.equal(compiled(hidden, weight, **options), linear_sample(hidden, weight, **options))


@pytest.mark.parametrize("options", [(1.0, None, None, None, None), (0.5, 2.0, torch.tensor([1, 2]), 5, 0.9)], ids=str)
def test_opcheck(options):
    arguments = torch.randn(2, 4), torch.randn(70, 4), torch.tensor(3), *options
    arguments = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(torch.ops.quietstar.linear_sample.default, (*arguments, "triton"))
