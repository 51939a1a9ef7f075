"""``linear_sample`` against the bare matmul of its logits, and against PyTorch's softmax and multinomial.

FLOPs counted: 2 rows H V of the matmul. Up to a hundred rows it is bound by reading the head, V H elements; the bytes
counted are those and the hidden states'. Logits, 4 bytes each, are what sampling adds if they are written; at 16384
rows of 32000 on an H200, writing and reading them takes 0.9 ms, the matmul 5.5.

Promised on an H200: with 16384 rows at most 1.25 times as long as the matmul alone.
"""

import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from comparison import OURS
from measure import DEVICE, own_peak_memory, peak_memory
from peers import COMPILED, FUSED, OUR_TORCH, PLAIN, UNTOLD_MEMORY, compiled, present
from shapes import LINEAR_SAMPLE, HeadShape, by_rows
from torch import Tensor
from torch.nn import functional as F

from quietstar.ops import linear_sample
from quietstar.ops._backend import BACKENDS

pytestmark = pytest.mark.usefixtures("memory_kept")

SHAPES = by_rows(LINEAR_SAMPLE[DEVICE])
MATMUL = "the matmul alone"
TEMPERATURE, SUPPRESSED = 0.8, (0, 1)  # thoughts are drawn without their start and end token
SEED = 7

Sampler = Callable[[Tensor, Tensor], Tensor]


def random_inputs(shape: HeadShape) -> tuple[Tensor, Tensor]:
    make = partial(torch.randn, device=DEVICE, dtype=shape.dtype)
    weight = make(shape.vocab_size, shape.hidden_size) * (3 * shape.hidden_size**-0.5)
    return make(shape.rows, shape.hidden_size), weight


def plain(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    logits[:, list(SUPPRESSED)] = -torch.inf
    return torch.multinomial((logits / TEMPERATURE).softmax(dim=1), 1).squeeze(1)


def candidate(name: str) -> Sampler:
    backend = "torch" if name == OUR_TORCH else name
    if backend in BACKENDS:
        return partial(linear_sample, temperature=TEMPERATURE, suppress=SUPPRESSED, seed=SEED, backend=backend)
    return compiled(plain) if name == COMPILED else {MATMUL: F.linear, PLAIN: plain}[name]


def assert_right(backend: str, hidden: Tensor, weight: Tensor) -> None:
    """The specification's tokens, but where two tie to within the rounding of their logits."""
    same = candidate(backend)(hidden, weight) == candidate("reference")(hidden, weight)
    assert same.float().mean() >= (0.999 if hidden.dtype == torch.float32 else 0.99)


def runs_at_all(name: str, hidden: Tensor, weight: Tensor) -> Sampler:
    """A peer's tokens are its own, but none is suppressed."""
    sampler = candidate(name)
    if name == OUR_TORCH:
        assert_right(name, hidden, weight)
    result = sampler(hidden, weight)
    assert name == MATMUL or not torch.isin(result, torch.tensor(SUPPRESSED, device=DEVICE)).any()
    return sampler


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("backend", FUSED)
def bench_linear_sample(backend, case, compare):
    shape = SHAPES[case]
    inputs = random_inputs(shape)
    try:
        candidate(backend)(*(x[:4] for x in inputs))
    except ValueError as unavailable:
        pytest.skip(str(unavailable))
    assert_right(backend, *inputs)
    peers, missing = present((MATMUL, PLAIN, COMPILED, OUR_TORCH), lambda name: runs_at_all(name, *inputs))
    runs = {name: partial(sampler, *inputs) for name, sampler in ({OURS: candidate(backend)} | peers).items()}
    memory = {
        name: peak_memory(__file__, backend if name == OURS else name, case, run=run)
        for name, run in runs.items()
        if name not in UNTOLD_MEMORY
    }
    compare(
        runs.pop(OURS),
        runs,
        rounds=9 if shape.rows > 100 else 41,
        promised=0.8 if DEVICE == "cuda" and shape.rows == 16384 else None,
        memory=memory,
        flops=2 * shape.rows * shape.hidden_size * shape.vocab_size,
        dtype=shape.dtype,
        moved=sum(x.nbytes for x in inputs),
        missing=missing,
        shape=shape,
        less_work=peers.keys() & {MATMUL},
    )


if __name__ == "__main__":
    name, case = sys.argv[1:]
    candidate(name)(*random_inputs(SHAPES[case]))
    print(own_peak_memory())
