"""The compiled kernels of the cpu backend: every instruction set, any number of threads, and wrong pointers."""

import contextlib
import re
import threading
import time

import numpy as np
import pytest
import torch
from cross_entropy_problem import CASES, Problem, assert_problem_solved
from thought_attention_cases import CASES as CASES_OF_ATTENTION
from thought_attention_cases import case
from tolerances import assert_as_accurate
from torch import Tensor

from quietstar.ops import (
    _native,
    linear_cross_entropy,
    linear_sample,
    mix_logits,
    mixed_cross_entropy,
    thought_attention,
)
from quietstar.ops._backend import select_backend
from quietstar.ops.linear_cross_entropy import backend_cpu
from quietstar.ops.mixing.backend_native import Native
from quietstar.ops.mixing.backends import BACKENDS, Mix

if _native._C is None:
    pytest.skip("needs the compiled module: `pip install .` builds it", allow_module_level=True)
cpu = _native._C.cpu

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=cpu.instruction_sets())
def instruction_set(request):
    before = cpu.instruction_set()
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(before)


def test_the_best_instruction_set_is_used():
    assert cpu.instruction_set() == cpu.instruction_sets()[-1]
    with pytest.raises(ValueError, match=r"name must be one of baseline.*, got mmx"):
        cpu.use_instruction_set("mmx")


def elementary(function, x):
    result = torch.full_like(x, torch.nan)
    function(x.data_ptr(), result.data_ptr(), x.numel())
    return result


def units_in_last_place(actual: Tensor, exact: Tensor) -> float:
    unit = torch.from_numpy(np.spacing(exact.abs().float().numpy())).double()
    return ((actual.double() - exact) / unit).abs().max().item()


@pytest.mark.usefixtures("instruction_set")
def test_exponential():
    """From below the smallest subnormal number to above the largest."""
    x = torch.cat([torch.linspace(-104, 88.72, 1_000_003), torch.linspace(-1, 1, 100_001)])
    assert units_in_last_place(elementary(cpu.exponential, x), x.double().exp()) <= 1
    special = torch.tensor([-torch.inf, -1e30, -104.1, -0.0, 0, 88.73, 1e30, torch.inf, torch.nan])
    torch.testing.assert_close(elementary(cpu.exponential, special), torch.exp(special), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("instruction_set")
def test_logarithm():
    x = torch.cat([torch.logspace(-37.9, 38.5, 1_000_003), torch.linspace(0.5, 2, 100_001)])
    assert units_in_last_place(elementary(cpu.logarithm, x), x.double().log()) <= 1


@pytest.mark.usefixtures("instruction_set")
def test_hyperbolic_tangent():
    x = torch.cat([torch.linspace(-12, 12, 1_000_003), torch.logspace(-37.9, 38.5, 100_001)])
    assert units_in_last_place(elementary(cpu.hyperbolic_tangent, x), x.double().tanh()) <= 2
    special = torch.tensor([-torch.inf, -1e-42, -0.0, 0, torch.inf, torch.nan])
    actual = elementary(cpu.hyperbolic_tangent, special)
    torch.testing.assert_close(actual, torch.tanh(special), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual[:-1].signbit(), special[:-1].signbit())


def values_and_gradients(function, *inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    result.sum().backward()
    return [result.detach(), *(x.grad for x in leaves)]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("vocabulary", [1, 3, 16, 511, 1037])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixing_with_every_instruction_set(dtype, vocabulary):
    base, thought = torch.randn(2, 5, vocabulary).mul(3).to(dtype)
    mixing, target = torch.randn(5).to(dtype), torch.randint(vocabulary, (5,))
    for function in (
        lambda *x, backend: mix_logits(*x, backend=backend).square(),
        lambda *x, backend: mixed_cross_entropy(*x, target, reduction="none", backend=backend),
    ):
        results = [
            values_and_gradients(lambda *x, b=backend, f=function: f(*x, backend=b), base, thought, mixing)
            for backend in ("cpu", "torch")
        ]
        torch.testing.assert_close(*results)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("name",
    [
        "mean", "none", "vocabulary 1000", "suppress and temperature", "huge logits", "softcap, temperature, suppress",
        "entropy, suppress, temperature", "entropy, softcap, vocabulary 32002",
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy_with_every_instruction_set(dtype, name):
    problem = Problem(dtype=dtype, **CASES[name])
    assert_problem_solved(problem, problem.ours("cpu"))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary", "hidden_size"), [(200, 1400, 300), (193, 385, 17), (3, 191, 1)])
def test_linear_cross_entropy_crosses_every_block(rows, vocabulary, hidden_size, dtype):
    """More rows, tokens and columns than a block has; all three end inside one."""
    problem = Problem(
        rows=rows, vocabulary=vocabulary, hidden_size=hidden_size, dtype=dtype, suppress=(0, vocabulary - 2),
        ignored=(0, 7 % rows), temperature=0.7, size=hidden_size**-0.5,
    )  # fmt: skip
    assert_problem_solved(problem, problem.ours("cpu"))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("rows", [1, 5, 193])
def test_linear_cross_entropy_keeps_to_its_room(rows, monkeypatch):
    """A vocabulary of whole blocks leaves no slack in a row, and the rows end inside a tile."""
    rooms = []

    def guarded_buffer(rows, vocabulary, dtype, device):
        rooms.append(torch.full((rows * vocabulary + 12 * vocabulary,), 7.0))
        rooms[-1][: rows * vocabulary] = torch.nan
        return rooms[-1][: rows * vocabulary].view(rows, vocabulary)

    monkeypatch.setattr(backend_cpu, "logits_buffer", guarded_buffer)
    problem = Problem(rows=rows, vocabulary=384)
    assert_problem_solved(problem, problem.ours("cpu"))
    (room,) = rooms
    assert (room[-12 * 384 :] == 7).all()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3, "suppress": (1, 900), "softcap": 3.0},
        {"top_k": 20, "softcap": 2.0},
        {"top_k": 300, "top_p": 0.7},
    ],
    ids=str,
)
def test_linear_sample_with_every_instruction_set(options):
    hidden, weight = torch.randn(500, 8), torch.randn(1037, 8)
    actual, expected = (linear_sample(hidden, weight, seed=5, backend=b, **options) for b in ("cpu", "reference"))
    assert torch.equal(actual, expected)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary", "size"), [(2, 9000, 700), (130, 4133, 300), (200, 63, 5)])
def test_linear_sample_crosses_every_block(rows, vocabulary, size, dtype):
    """More rows, tokens and columns than a block has; all three end inside one, and the operands are not contiguous."""
    hidden = torch.randn(rows, 2 * size).to(dtype)[:, :size]
    weight = torch.randn(2 * vocabulary, size).to(dtype)[::2]
    options = {"seed": -7, "suppress": (0, vocabulary - 1), "temperature": size**0.5, "softcap": 2 * size**0.5}
    actual, expected = (linear_sample(hidden, weight, backend=b, **options) for b in ("cpu", "reference"))
    assert torch.equal(actual, expected)


# More anchors than a task has, more base keys than a block has; both end inside one.
LONG = {
    "all keys": ({"length": 70, "steps": 9}, {}),
    "few anchors of many keys": ({"length": 200, "num_anchors": 2, "steps": 1, "kv_heads": 1}, {"anchors": [199, 63]}),
    "window, padding, any order": (
        {"length": 100, "num_anchors": 75},
        {"anchors": [(37 * i) % 101 - 1 for i in range(75)], "window": 45, "key_start": [0, 40]},
    ),
    "documents, any order": (
        {"length": 100, "num_anchors": 75},
        {
            "anchors": [(37 * i) % 101 - 1 for i in range(75)],
            "key_start": [[0, 40, 80] * 25, [(29 * i) % 101 for i in range(75)]],
        },
    ),
    "head size of whole vectors": ({"length": 40, "head": 32, "query_heads": 2}, {"window": 33}),
    "thought lengths, blocks of few rows, one of none": (
        {"length": 100, "num_anchors": 75, "steps": 5, "thought_steps": 7},
        {
            "anchors": [(37 * i) % 101 - 1 for i in range(75)],
            "thought_lengths": [[(29 * i) % 8 for i in range(75)], [0] * 40 + [7, 3] * 17 + [0]],
        },
    ),
    "no query in one of the texts": (
        {"length": 40, "steps": 2},
        {"thought_lengths": [[0, 1, 2, 1] * 10, [0] * 40]},
    ),
    "window from the step, long thoughts": (
        {"length": 70, "num_anchors": 9, "steps": 35, "thought_steps": 45, "query_heads": 2},
        {"anchors": [69, 0, 33, 50, -1, 69, 2, 31, 32], "window": 37, "window_from": "step", "causal": False},
    ),
    "softcap, values of whole vectors": (
        {"length": 70, "steps": 4, "head": 5, "value_head": 32},
        {"softcap": 1.2, "scale": 0.8, "window": 45, "window_from": "step", "key_start": [0, 40]},
    ),
    "large values": ({"length": 40, "head": 24, "value_head": 200, "query_heads": 2}, {"causal": False}),
}


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(
    "name", ["long thoughts (T = 40)", "unsorted, repeated, inactive", "odd head size, scale", *LONG]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thought_attention_with_every_instruction_set(dtype, name):
    inputs, options = case(name, dtype, cases=CASES_OF_ATTENTION | LONG)
    actual, eager, oracle = (
        values_and_gradients(lambda *x, b=backend: thought_attention(*x, backend=b, **options), *given)
        for backend, given in (
            ("cpu", inputs), ("reference", inputs), ("reference", [x.detach().double() for x in inputs]),
        )
    )  # fmt: skip
    for values in zip(actual, eager, oracle, strict=True):
        assert_as_accurate(*values)


def test_gradients_of_base_keys_are_sums_of_all_chains():
    """However many threads add up the gradients of the base keys."""
    inputs, options = case("all keys", cases=LONG)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7, 50):
            torch.set_num_threads(count)
            results.append(values_and_gradients(lambda *x: thought_attention(*x, backend="cpu", **options), *inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_threads_change_nothing():
    inputs = *torch.randn(2, 100, 3000), torch.randn(100)
    hidden, weight, target = torch.randn(100, 8), torch.randn(3000, 8), torch.randint(3000, (100,))
    attention, _ = case("all positions")
    threads = torch.get_num_threads()

    def everything():
        return [
            *values_and_gradients(mix_logits, *inputs),
            *values_and_gradients(lambda *x: mixed_cross_entropy(*x, target), *inputs),
            linear_cross_entropy(hidden, weight, target, reduction="none"),
            linear_sample(hidden, weight, seed=1),
            linear_sample(hidden, weight, seed=1, top_p=0.9),
            *values_and_gradients(thought_attention, *attention),
        ]

    try:
        torch.set_num_threads(1)
        expected = everything()
        torch.set_num_threads(3)
        for a, b in zip(everything(), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # matmuls are the library's
    finally:
        torch.set_num_threads(threads)


def test_other_python_threads_run_meanwhile():
    logits, rows = torch.randn(1, 32000), 4000
    mix = Mix(logits.expand(rows, -1), logits.expand(rows, -1), torch.rand(rows))
    started, steps = threading.Event(), 0

    def work():
        started.set()
        Native("cpu").cross_entropy(mix, torch.zeros(rows, dtype=torch.int64))

    worker = threading.Thread(target=work)
    worker.start()
    started.wait()
    while worker.is_alive():
        time.sleep(1e-4)
        steps += 1
    assert steps > 3


def test_gradients_of_one_number_for_all_rows():
    """A copy that is made of it lives until the kernel has read it."""
    mix, target = Mix(*torch.randn(2, 9, 7), torch.rand(9)), torch.randint(7, (9,))
    backend, scale = Native("cpu"), torch.tensor(0.5).expand(9)
    result = backend.cross_entropy(mix, target)
    actual, expected = (
        backend.cross_entropy_backward(x, mix, target, result, [True, True]) for x in (scale, scale.clone())
    )
    assert all(map(torch.equal, actual, expected))


# The contract of the native functions. What is reached through the ops is checked there; these are called directly.

HIDDEN, HEAD, IDS, ROWS = torch.randn(2, 4), torch.randn(8, 4), torch.tensor([0, 7]), torch.empty(2)
VALID = {
    "dtype": 0, "hidden": HIDDEN.data_ptr(), "hidden_stride": 4, "weight": HEAD.data_ptr(), "weight_stride": 4,
    "target": IDS.data_ptr(), "scale": 0, "entropy_scale": 0, "suppressed": 0, "suppressed_count": 0,
    "temperature": 1.0, "softcap": 0.0, "room": 0, "nll": ROWS.data_ptr(), "entropy": 0, "d_hidden": 0, "d_weight": 0,
    "add": False,
    "rows": 2, "vocabulary": 8, "size": 4, "threads": 1,
}  # fmt: skip
WRONG = {
    "dtype": ({"dtype": 2}, "dtype must be 0 (float32) or 1 (bfloat16), got 2"),
    "null hidden": ({"hidden": 0}, "hidden must not be null"),
    "misaligned hidden": ({"hidden": HIDDEN.data_ptr() + 2}, "hidden must be aligned to 4 bytes, got"),
    "negative stride": ({"weight_stride": -4}, "stride must be at least 0, got -4"),
    "null target": ({"target": 0}, "target must not be null"),
    "target out of range": ({"vocabulary": 7}, "target must be in [0, 7), got 7"),
    "misaligned scale": ({"scale": 1}, "scale must be aligned to 4 bytes, got 1"),
    "a scale, but no entropy": ({"entropy_scale": ROWS.data_ptr()}, "entropy must not be null"),
    "no room": ({"scale": ROWS.data_ptr()}, "room must not be null"),
    "null suppressed": ({"suppressed_count": 3}, "suppressed must not be null"),
    "negative rows": ({"rows": -1}, "rows must be at least 0, got -1"),
    "no vocabulary": ({"vocabulary": 0}, "vocabulary must be at least 1, got 0"),
    "no columns": ({"size": 0}, "size must be at least 1, got 0"),
    "no threads": ({"threads": 0}, "threads must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_pointers_and_sizes_are_refused(name):
    cpu.linear_cross_entropy(*VALID.values())
    expected = torch.nn.functional.cross_entropy(HIDDEN @ HEAD.t(), IDS, reduction="none")
    torch.testing.assert_close(ROWS, expected)
    wrong, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        cpu.linear_cross_entropy(*{**VALID, **wrong}.values())


def test_wrong_calls_of_the_other_kernels_are_refused():
    memory = torch.zeros(64)
    place = memory.data_ptr()
    mix = [place, 8, place, 8, place]
    for function, arguments, message in (
        (cpu.mix, (2, *mix, place, 1, 8, 1), "dtype must be 0 (float32) or 1 (bfloat16), got 2"),
        (cpu.mix, (0, *mix, 0, 1, 8, 1), "mixed must not be null"),
        (cpu.mix_backward, (0, 0, 8, *mix, 0, 0, 0, 1, 8, 1), "grad must not be null"),
        (cpu.mixed_cross_entropy, (0, *mix, place, place, 0, place, place, 1, 8, 1), "slope must not be null"),
        (cpu.mixed_cross_entropy_backward, (0, 0, *mix, *[place] * 3, 0, 0, 1, 8, 1), "scale must not be null"),
        (cpu.sample_rows, (place, 0, 0, 0, 1, 0, 1.0, 0.0, 0, 1.0, 1, 1, 1), "tokens must not be null"),
        (cpu.sample_rows, (place, place, 0, 0, 1, 0, 1.0, 0.0, 0, 1.0, 1, 0, 1), "groups must be at least 1, got 0"),
        (
            cpu.linear_sample, (0, place, 1, place, 1, 0, place, 0, 0, 1, 0, 1.0, 0.0, 1, 1, 1, 1),
            "logits must not be null",
        ),
        (
            cpu.linear_sample, (0, place, 1, place, 1, place, place, 0, 0, 1, 0, 1.0, 0.0, 1, 1, 0, 1),
            "size must be at least 1, got 0",
        ),
        (cpu.exponential, (place, 0, 3), "result must not be null"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            function(*arguments)


ONES, THREE, NONE = torch.ones(64), torch.tensor([3]), (0, (0, 0))
STEPS, BAD_INDEX = (ONES.data_ptr(), (8, 8, 8, 8)), (THREE.data_ptr(), (0, 0))
MASK = {
    "anchors": NONE, "key_start": NONE, "thought_lengths": NONE, "window": 0, "window_from_step": False,
    "causal": True, "scale": 1.0, "softcap": 0.0,
}  # fmt: skip
TENSORS = (
    "query", "key", "value", "thought_key", "thought_value", "base_output", "output", "lse", "grad_output", "grad_lse",
    "base_grad_query", "grad_query", "grad_key", "grad_value", "grad_thought_key", "grad_thought_value",
)  # fmt: skip
WRONG_ATTENTION = [  # sizes, changes of the mask and of the tensors
    ([1] * 8, {}, {}, "sizes must be B, Hq, Hkv, P, S, T, L, D, Dv, got 8"),
    ([1, 1, 1, 1, 1, 1, 1, 1, 0], {}, {}, "sizes must be at least 1, got 0"),
    ([1, 3, 2, 1, 1, 1, 1, 8, 8], {}, {}, "Hq must be a multiple of Hkv, got 3"),
    ([1, 2, 1, 1, 3, 2, 1, 8, 8], {}, {}, "T must be at least 3, got 2"),
    ([1, 1, 1, 2, 1, 1, 1, 1, 1], {}, {}, "P must be L without anchors, got 2"),
    ([1] * 9, {"anchors": BAD_INDEX}, {}, "anchors must be in [-1, 0], got 3"),
    ([1] * 9, {"key_start": BAD_INDEX}, {}, "key_start must be in [0, 1], got 3"),
    ([1] * 9, {"thought_lengths": BAD_INDEX}, {}, "thought_lengths must be in [0, 1], got 3"),
    ([1] * 9, {"anchors": (THREE.data_ptr(), (0, 2))}, {}, "anchors must have an anchor stride of at most 1, got 2"),
    ([1] * 9, {"key_start": (THREE.data_ptr(), (0,))}, {}, "key_start must come with 2 strides, got 1"),
    ([1] * 9, {"window": -1}, {}, "window must be at least 0, got -1"),
    ([1] * 9, {}, {"key": None}, "key must be among the tensors"),
    ([1] * 9, {}, {"lse": (0, STEPS[1])}, "lse must not be null"),
    ([1] * 9, {}, {"output": (STEPS[0], (8, 8))}, "output must come with 4 strides, got 2"),
]


@pytest.mark.parametrize("function", [cpu.thought_attention, cpu.thought_attention_backward])
@pytest.mark.parametrize(("sizes", "mask", "tensors", "message"), WRONG_ATTENTION)
def test_wrong_calls_of_thought_attention_are_refused(sizes, mask, tensors, message, function):
    tensors = {name: x for name, x in (dict.fromkeys(TENSORS, STEPS) | tensors).items() if x is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        function(0, sizes, tuple((MASK | mask).values()), tensors, 1)


def test_a_gradient_of_the_lse_may_be_absent_but_not_misaligned():
    for address, message in ((0, None), (2, "grad_lse must be aligned to 4 bytes, got 2")):
        tensors = dict.fromkeys(TENSORS, STEPS) | {"grad_lse": (address, STEPS[1])}
        refused = contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message)
        with refused:
            cpu.thought_attention_backward(0, [1] * 9, tuple(MASK.values()), tensors, 1)


# Which backend runs.


@pytest.mark.parametrize(
    ("tensor", "name"),
    [(torch.zeros(1), "cpu"), (torch.zeros(1).bfloat16(), "cpu"), (torch.zeros(1).half(), "torch")],
    ids=["float32", "bfloat16", "float16"],
)
def test_auto_takes_the_cpu_backend_where_it_can(tensor, name, monkeypatch):
    monkeypatch.delenv("QUIETSTAR_BACKEND", raising=False)
    assert select_backend("mix_logits", None, BACKENDS, tensor) == name


def test_other_dtypes_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match=r"'cpu' cannot run mix_logits here: its kernels take float32, bfloat16, got"):
        mix_logits(*torch.zeros(2, 3, 4).half(), torch.zeros(3), backend="cpu")
