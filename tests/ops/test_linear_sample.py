"""linear_sample and its noise: bits, distribution, and the same tokens whatever the backend and tiling."""

import math
import re

import numpy as np
import pytest
import torch
from backends import ALL, FAST, with_dtypes
from broken_rows import assert_broken_rows_have_no_token
from scipy import stats

from quietstar.ops import _rows, linear_sample
from quietstar.ops.linear_sample import backend_torch, noise
from quietstar.ops.linear_sample.backends import BACKENDS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# A test that is right fails by chance once in this many runs; with fixed seeds, either never or always.
CHANCE = 1e-4


# The noise.


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors published with the generator."""
    words = [tuple(torch.tensor([int(word, 16)]) for word in text.split()) for text in (counter, key)]
    assert " ".join(f"{word.item():08x}" for word in noise.philox(*words)) == expected


def expected_arrival(seed, row, token):
    """E(token), from the definition in noise.py, in Python integers and floats."""

    def philox(c0, c3):
        c1, c2 = row % 2**32, row // 2**32
        k0, k1 = seed % 2**32, seed // 2**32 % 2**32
        for _ in range(10):
            high0, low0 = divmod(0xD2511F53 * c0, 2**32)
            high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        return c0, c1, c2, c3

    def exponential(word):
        uniform = (np.float32(word) + np.float32(0.5)) * np.float32(2**-32)
        return -math.log1p(-min(uniform.item(), 1 - 2**-24))

    group = token // 64
    time, place = philox(group // 2, 1)[2 * (group % 2) :][:2]
    first = exponential(time) / 64
    return first if token % 64 == place >> 26 else first + exponential(philox(token // 4, 0)[token % 4])


@pytest.mark.parametrize("seed", [0, 12345, -7, 2**63 - 1, 5 << 32])
def test_noise_is_what_its_definition_says(seed):
    rows, groups = torch.tensor([0, 1, 2**32 - 1, 2**40 + 3]), torch.arange(5)
    first, places = noise.first_arrivals(torch.tensor(seed), rows, 5)
    times = noise.arrivals(torch.tensor(seed), rows[:, None], groups.expand(4, 5), first, places).flatten(1)
    expected = [[expected_arrival(seed, int(row), token) for token in range(5 * 64)] for row in rows]
    torch.testing.assert_close(times.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def draw_times(rows=20000, groups=2, seed=3):
    rows, numbers = torch.arange(rows), torch.arange(groups)
    first, places = noise.first_arrivals(torch.tensor(seed), rows, groups)
    return noise.arrivals(torch.tensor(seed), rows[:, None], numbers.expand_as(first), first, places).flatten(1)


def test_arrival_times_are_independent_and_exponential():
    times = draw_times()
    for token in (0, 1, 63, 64, 127):
        assert stats.kstest(times[:, token], "expon").pvalue > CHANCE
    # Sums and minima of tokens have their known distributions only if the tokens are independent.
    assert stats.kstest(times[:, :64].sum(1), "gamma", (64,)).pvalue > CHANCE
    assert stats.kstest(times[:, :64].amin(1) * 64, "expon").pvalue > CHANCE
    assert stats.kstest(times[:, 3:7].amin(1) * 4, "expon").pvalue > CHANCE
    assert stats.kstest(times.amin(1) * 128, "expon").pvalue > CHANCE
    assert stats.chisquare(times.argmin(1).bincount(minlength=128)).pvalue > CHANCE
    second = times[:, :64].topk(2, largest=False).values
    assert stats.kstest((second[:, 1] - second[:, 0]) * 63, "expon").pvalue > CHANCE
    correlation = torch.corrcoef(torch.cat([times[:-1], times[1:]], dim=1).t())
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 6 / len(times) ** 0.5


def test_extreme_words_give_finite_noise():
    words = torch.tensor([0, 1, 2**24, 2**31, 2**32 - 256, 2**32 - 1])
    times = noise.exponential_(words.float())
    assert (times > 0).all()
    assert times.isfinite().all()
    assert times[0].item() == 2.0**-33
    assert (times.diff() >= 0).all()


# The tokens.


def head(probabilities):
    """A hidden state and a head that give these probabilities at temperature 1."""
    return torch.ones(1, 1), torch.tensor(probabilities, dtype=torch.float64).log().float()[:, None]


def allowed(probabilities, suppress=(), temperature=1.0, softcap=None, top_k=None, top_p=None):
    """The distribution that linear_sample must draw from, by sorting in Python floats."""
    logits = {token: math.log(p) for token, p in enumerate(probabilities) if token not in suppress and p > 0}
    if softcap is not None:
        logits = {token: softcap * math.tanh(z / softcap) for token, z in logits.items()}
    if top_k is not None:
        kth = sorted(logits.values(), reverse=True)[:top_k][-1]
        logits = {token: z for token, z in logits.items() if z >= kth}
    weights = {token: math.exp(z / temperature) for token, z in logits.items()}
    if top_p is not None:
        total, before, last = sum(weights.values()), 0.0, math.inf
        for weight in sorted(weights.values(), reverse=True):
            if before < top_p * total:
                last = weight
            before += weight
        weights = {token: weight for token, weight in weights.items() if weight >= last}
    total = sum(weights.values())
    return torch.tensor([weights.get(token, 0.0) / total for token in range(len(probabilities))])


SMALL = [0.5, 0.25, 0.15, 0.06, 0.03, 0.0099, 0.0001]
LARGE = [2.0 ** -(1 + i % 7) * (1 + i % 5) / 100 for i in range(150)]  # three groups of the noise, the last cut short
FILTERS = {
    "all": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 3.0},
    "suppress": {"suppress": (0, 4)},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8, "temperature": 1.5},
    "softcap": {"softcap": 1.5, "temperature": 0.4},
    "everything": {"suppress": (1,), "temperature": 0.7, "top_k": 5, "top_p": 0.9, "softcap": 4.0},
}


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("probabilities", [SMALL, LARGE], ids=["V = 7", "V = 150"])
@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_distribution(options, probabilities, backend):
    rows = 50_000
    hidden, weight = head(probabilities)
    tokens = linear_sample(hidden.expand(rows, 1), weight, seed=11, backend=backend, **options)
    counts = tokens.bincount(minlength=len(probabilities))
    expected = allowed(probabilities, **options) * rows
    assert not counts[expected == 0].any()
    rare = (expected > 0) & (expected < 5)  # too few for the chi-square distribution: pooled
    observed = torch.cat([counts[expected >= 5], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[expected >= 5], expected[rare].sum()[None]]).double()
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert len(observed) > 1
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > CHANCE


@pytest.mark.usefixtures("default_backend")
@pytest.mark.parametrize("scale", [0.02, 0.5, 3.0])
@pytest.mark.parametrize("vocabulary", [7, 77, 1000, 32002])
@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_backends_draw_the_same_tokens(options, vocabulary, scale):
    rows = 1000 if vocabulary < 2000 else 40
    hidden, weight = torch.randn(rows, 8), torch.randn(vocabulary, 8) * scale
    tokens = linear_sample(hidden, weight, seed=5, **options)
    same = tokens == linear_sample(hidden, weight, seed=5, backend="reference", **options)
    assert same.float().mean() >= 0.999


@pytest.mark.parametrize(
    ("backend", "dtype"), with_dtypes([torch.float16, torch.bfloat16, torch.float64], ["torch", "cpu"])
)
def test_dtypes(backend, dtype):
    hidden, weight = torch.randn(500, 8).to(dtype), torch.randn(300, 8).to(dtype)
    tokens = linear_sample(hidden, weight, seed=5, backend=backend)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, linear_sample(hidden, weight, seed=5, backend="reference"))
    assert (tokens == linear_sample(hidden.float(), weight.float(), seed=5, backend=backend)).float().mean() >= 0.99


@pytest.mark.usefixtures("default_backend")
@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"temperature": 0}], ids=str)
def test_tiling_changes_nothing(options, monkeypatch):
    hidden, weight = torch.randn(300, 8), torch.randn(1000, 8)
    expected = linear_sample(hidden, weight, seed=5, **options)
    assert torch.equal(linear_sample(hidden[:77], weight, seed=5, **options), expected[:77])
    monkeypatch.setitem(_rows.CHUNK_BYTES, "cpu", 50 * 1024 * 4)
    monkeypatch.setitem(_rows.BLOCK_BYTES, "cpu", 7 * 1024 * 4)
    monkeypatch.setattr(noise, "_SERIAL", 1000)
    monkeypatch.setattr(backend_torch, "_FIRST_DRAWN", 1)
    monkeypatch.setattr(backend_torch, "_DRAWN_TOGETHER", 50)
    assert torch.equal(linear_sample(hidden, weight, seed=5, **options), expected)


def test_drawing_everything_changes_nothing(monkeypatch):
    """As on a GPU, where ruling groups out would wait for the device."""
    hidden, weight = torch.randn(50, 8), torch.randn(1000, 8)
    expected = linear_sample(hidden, weight, seed=5, backend="torch")
    monkeypatch.setattr(backend_torch, "_FIRST_DRAWN", 10**6)
    assert torch.equal(linear_sample(hidden, weight, seed=5, backend="torch"), expected)


def test_few_groups_are_drawn(monkeypatch):
    drawn = []
    arrivals = backend_torch.arrivals
    monkeypatch.setattr(backend_torch, "arrivals", lambda *args: drawn.append(args[2].numel()) or arrivals(*args))
    linear_sample(torch.randn(64, 8), torch.randn(32002, 8) * 0.3, seed=5, backend="torch")
    assert sum(drawn) < 64 * 501 / 20


@pytest.mark.parametrize("backend", ALL)
def test_seed(backend):
    hidden, weight = torch.ones(200, 8), torch.randn(50, 8) * 0.1
    tokens = [
        linear_sample(hidden, weight, seed=seed, backend=backend) for seed in (1, torch.tensor(1), 2, 1 << 32, -1)
    ]
    assert torch.equal(tokens[0], tokens[1])
    for other in tokens[2:]:  # 50 nearly equal probabilities: one in 50 rows agrees by chance
        assert (tokens[0] == other).float().mean() < 0.1
    assert len(tokens[0].unique()) > 25  # rows that look alike are drawn independently


@pytest.mark.parametrize("backend", ALL)
def test_greedy(backend):
    hidden, weight = torch.randn(100, 8), torch.randn(1000, 8)
    logits = hidden @ weight.t()
    for options in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}):
        assert torch.equal(linear_sample(hidden, weight, seed=3, backend=backend, **options), logits.argmax(1))
    suppress = logits.argmax(1).unique()
    logits[:, suppress] = -math.inf
    tokens = linear_sample(hidden, weight, temperature=0, suppress=suppress, seed=3, backend=backend)
    assert torch.equal(tokens, logits.argmax(1))


@pytest.mark.parametrize("backend", ALL)
def test_greedy_takes_the_lowest_id_on_ties(backend):
    weight = torch.zeros(1000, 1)
    weight[[130, 131, 700]] = 1
    tokens = linear_sample(torch.ones(3, 1), weight, temperature=0, seed=3, backend=backend)
    assert tokens.tolist() == [130] * 3


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_ties_at_the_edge_of_top_k_and_top_p_stay(options, backend):
    hidden, weight = head([0.4, 0.2, 0.2, 0.1, 0.1])
    tokens = linear_sample(hidden.expand(500, 1), weight, seed=3, backend=backend, **options)
    assert tokens.unique().tolist() == [0, 1, 2]


@pytest.mark.usefixtures("default_backend")
@pytest.mark.parametrize("draws", [1_000_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_no_token_of_probability_zero(draws):
    hidden, weight = torch.ones(draws, 1), torch.randn(7, 1) * 3
    weight[5] = -200.0  # its probability is below the smallest float32
    tokens = linear_sample(hidden, weight, suppress=(2, 4), seed=1)
    assert set(tokens.unique().tolist()) == {0, 1, 3, 6}


@pytest.mark.parametrize("backend", ALL)
def test_a_lone_token_wins_however_unlikely_its_noise(backend):
    hidden, weight = torch.ones(2000, 1), torch.full((300, 1), -80.0)
    suppress = [token for token in range(300) if token != 257]
    assert (linear_sample(hidden, weight, suppress=suppress, seed=1, backend=backend) == 257).all()


@pytest.mark.parametrize("backend", FAST)
def test_rows_from_which_no_token_can_be_drawn(backend):
    assert_broken_rows_have_no_token(BACKENDS[backend].load().sample_rows)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_a_broken_model_does_not_look_like_text(options, rows, backend):
    """NaN, +∞, or −∞ throughout is an error that names the row, unless it is suppressed; −∞ in places is not."""
    hidden, weight = torch.ones(rows, 4), torch.randn(300, 4)
    options = {"seed": 1, "backend": backend, **options}
    whole = linear_sample(hidden, weight, suppress=(64,), **options)
    for value in (math.nan, math.inf):
        weight[64] = value
        with pytest.raises(ValueError, match=r"hidden and weight must give .* in row 0"):
            linear_sample(hidden, weight, **options)
        assert torch.equal(linear_sample(hidden, weight, suppress=(64,), **options), whole)
    weight[64] = -math.inf
    assert torch.equal(linear_sample(hidden, weight, **options), whole)
    for value in (math.nan, -math.inf):
        last = hidden.clone()
        last[-1] = value
        with pytest.raises(ValueError, match=rf"hidden and weight must give .* in row {rows - 1}"):
            linear_sample(last, weight.abs(), suppress=(64,), **options)


@pytest.mark.parametrize("backend", ALL)
def test_where_values_are_not_read_a_broken_row_is_marked(backend):
    hidden, weight = torch.ones(3, 4), torch.randn(300, 4)
    options = {"seed": 1, "backend": backend}
    whole = linear_sample(hidden, weight, **options)
    hidden[1] = math.nan
    torch._dynamo.reset()
    tokens = torch.compile(linear_sample, fullgraph=True, backend="aot_eager")(hidden, weight, **options)
    assert tokens.tolist() == [whole[0], -1, whole[2]]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_p": 0.5}], ids=str)
def test_what_a_cap_makes_equal_is_equally_likely(options, backend):
    """Logits far beyond it: of equal ones the lowest token wins greedily, and none is left out by top_p."""
    weight = torch.full((150, 1), -1e3)
    weight[[5, 70, 149]] = torch.tensor([1e3, 3e3, 2e3])[:, None]
    tokens = linear_sample(torch.ones(300, 1), weight, softcap=40.0, seed=1, backend=backend, **options)
    assert tokens.unique().tolist() == ([5] if "temperature" in options else [5, 70, 149])


@pytest.mark.parametrize("backend", ALL)
def test_float16_logits_beyond_float16(backend):
    """They are large only before the temperature divides them."""
    hidden = torch.full((20, 4), 200.0)
    weight = torch.tensor([250.0, 249.0, 0.0, -250.0])[:, None].expand(4, 4)
    options = {"temperature": 1e3, "seed": 1, "backend": backend}
    tokens = linear_sample(hidden.half(), weight.half(), **options) if backend != "cpu" else None
    expected = linear_sample(hidden, weight, **options)
    assert tokens is None or torch.equal(tokens, expected)
    assert set(expected.tolist()) == {0, 1}


@pytest.mark.parametrize("backend", ALL)
def test_extreme_temperatures(backend):
    hidden, weight = torch.randn(20, 4), torch.randn(300, 4)
    greedy = linear_sample(hidden, weight, temperature=0, seed=1, backend=backend)
    assert torch.equal(linear_sample(hidden, weight, temperature=1e-30, seed=1, backend=backend), greedy)
    tokens = linear_sample(hidden, weight, temperature=1e30, suppress=(0,), seed=1, backend=backend)
    assert len(tokens.unique()) > 10


@pytest.mark.parametrize("backend", ALL)
def test_suppress_may_be_any_iterable(backend):
    hidden, weight = torch.ones(200, 1), torch.zeros(4, 1)
    for suppress in (iter([1, 3]), {1, 3}, torch.tensor(1).expand(2) * torch.tensor([1, 3])):
        tokens = linear_sample(hidden, weight, suppress=suppress, seed=1, backend=backend)
        assert set(tokens.tolist()) == {0, 2}


@pytest.mark.parametrize("backend", ALL)
def test_no_rows(backend):
    assert linear_sample(torch.randn(0, 4), torch.randn(9, 4), seed=1, backend=backend).shape == (0,)


@pytest.mark.usefixtures("default_backend")
def test_strides_and_gradients_do_not_matter():
    hidden, weight = torch.randn(8, 50), torch.randn(8, 300)
    tokens = linear_sample(hidden.t().requires_grad_(), weight.t().requires_grad_(), seed=5)
    assert not tokens.requires_grad
    assert torch.equal(tokens, linear_sample(hidden.t().contiguous(), weight.t().contiguous(), seed=5))


@pytest.mark.parametrize("backend", ALL)
def test_autocast(backend):
    hidden, weight = torch.randn(50, 8), torch.randn(300, 8)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = linear_sample(hidden, weight, seed=5, backend=backend)
    assert torch.equal(tokens, linear_sample(hidden.bfloat16(), weight.bfloat16(), seed=5, backend=backend))


@pytest.mark.parametrize("backend", ALL)
def test_compile(backend):
    hidden, weight = torch.randn(20, 8), torch.randn(300, 8)
    torch._dynamo.reset()
    compiled = torch.compile(linear_sample, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, torch.tensor(3)):
        options = {"seed": seed, "suppress": (3,), "top_k": 100, "backend": backend}
        assert torch.equal(compiled(hidden, weight, **options), linear_sample(hidden, weight, **options))


@pytest.mark.parametrize("options", [(1.0, None, None, None, None), (0.5, 2.0, torch.tensor([1, 2]), 5, 0.9)], ids=str)
def test_opcheck(options, default_backend):
    arguments = torch.randn(5, 4), torch.randn(70, 4), torch.tensor(3), *options, default_backend
    torch.library.opcheck(torch.ops.quietstar.linear_sample.default, arguments)


BAD = [
    ({"hidden": torch.randn(4)}, ValueError, "hidden must have shape [rows, H], got 1 dimensions: [4]"),
    ({"hidden": torch.zeros(3, 4).long()}, TypeError, "hidden must be float16, bfloat16, float32 or float64"),
    ({"weight": torch.randn(5, 3)}, ValueError, "weight must have shape [V, H] with H = 4 as in hidden, got [5, 3]"),
    ({"weight": torch.randn(5, 4).half()}, TypeError, "weight must have the dtype of hidden, torch.float32"),
    ({"weight": torch.randn(0, 4)}, ValueError, "weight must have at least one row"),
    ({"temperature": -0.1}, ValueError, "temperature must be 0 or positive, and finite, got -0.1"),
    ({"temperature": math.inf}, ValueError, "temperature must be 0 or positive, and finite, got inf"),
    ({"temperature": math.nan}, ValueError, "temperature must be 0 or positive, and finite, got nan"),
    ({"temperature": 1e-40}, ValueError, "temperature must be between 1e-30 and 1e+30, got 1e-40"),
    ({"temperature": torch.tensor(1.0)}, TypeError, "temperature must be a number, got Tensor"),
    ({"hidden": torch.randn(3, 0), "weight": torch.randn(5, 0)}, ValueError, "hidden must have at least one column"),
    ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
    ({"softcap": 0.0}, ValueError, "softcap must be None, or positive and finite, got 0.0"),
    ({"softcap": torch.tensor(1.0)}, TypeError, "softcap must be None or a number, got Tensor"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    ({"top_k": True}, TypeError, "top_k must be None or an integer, got bool"),
    ({"top_k": 2.0}, TypeError, "top_k must be None or an integer, got float"),
    ({"top_p": 0.0}, ValueError, "top_p must be in (0, 1], got 0.0"),
    ({"top_p": 1.1}, ValueError, "top_p must be in (0, 1], got 1.1"),
    ({"top_p": math.nan}, ValueError, "top_p must be in (0, 1], got nan"),
    ({"top_p": "most"}, TypeError, "top_p must be a number, got str"),
    ({"suppress": 3}, TypeError, "suppress must be token ids (integers), got 3"),
    ({"suppress": [True]}, TypeError, "suppress must be token ids (integers), got [True]"),
    ({"suppress": range(5)}, ValueError, "suppress must leave at least one token, got all 5"),
    ({"suppress": torch.tensor([0, 5])}, ValueError, "suppress must be token ids in [0, 5), got 5"),
    ({"seed": 1.0}, TypeError, "seed must be an integer or an int64 scalar, got float"),
    ({"seed": True}, TypeError, "seed must be an integer or an int64 scalar, got bool"),
    (
        {"seed": torch.tensor([1])},
        TypeError,
        "seed must be an integer or an int64 scalar, got torch.int64 of shape [1]",
    ),
    ({"seed": torch.tensor(1.0)}, TypeError, "seed must be an integer or an int64 scalar, got torch.float32"),
    ({"seed": torch.tensor(1, device="meta")}, ValueError, "seed must be on the device of weight, cpu, or on the CPU"),
    ({"seed": 2**63}, ValueError, f"seed must fit 64 bits, got {2**63}"),
    ({"backend": "cuda"}, ValueError, "'cuda' cannot run linear_sample here: "),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(change, error, message):
    valid = {"hidden": torch.randn(3, 4), "weight": torch.randn(5, 4), "seed": 1}
    linear_sample(**valid)
    with pytest.raises(error, match=re.escape(message)):
        linear_sample(**{**valid, **change})
