"""A warp-specialised kernel that adds by TMA, right and broken; for `pytest --emulate` alone, as is its forward."""

import math
from collections import Counter

import pytest
import torch
from tolerances import assert_as_accurate

from ptx import gluon_backward
from ptx.gluon_mutations import Subject, each
from ptx.launches import schedule


def problem(keys: int, rows_per_key: int):
    """Inputs of ``backward``."""
    query, grad_output = torch.randn(2, keys * rows_per_key, 128).bfloat16()
    key, value = torch.randn(2, keys, 128).bfloat16()
    scale = 0.1 / math.log(2)
    scores = query.double() @ key.double().T * scale
    lse = (torch.logsumexp(scores * math.log(2), 1) / math.log(2)).float()
    return query, grad_output, key, value, lse, torch.randn(len(query)), scale


def expected(query, grad_output, key, value, row_lse, row_delta, scale, dtype):
    """The same in PyTorch; a row sees blocks of keys that are wholly in front of its own."""
    query, grad_output, key, value = (x.to(dtype) for x in (query, grad_output, key, value))
    rows_per_key = len(query) // len(key)
    row, column = torch.arange(len(query)) // rows_per_key // 128, torch.arange(len(key)) // 128
    scores = (query @ key.T) * scale - row_lse.to(dtype)[:, None]
    probability = torch.exp2(scores).masked_fill(row[:, None] <= column, 0)
    grad_scores = probability * (grad_output @ value.T - row_delta.to(dtype)[:, None])
    return grad_scores @ key, grad_scores.T @ query, probability.T @ grad_output


def assert_right(inputs, results):
    eager, oracle = (expected(*inputs, dtype) for dtype in (torch.bfloat16, torch.float64))
    for name, *values in zip(("query", "key", "value"), results, eager, oracle, strict=True):
        assert_as_accurate(*values, unit=torch.bfloat16, name=f"gradient to the {name}")


@pytest.mark.parametrize(("keys", "rows_per_key"), [(256, 1), (512, 1), (384, 2)])
def test_right(keys, rows_per_key):
    inputs = problem(keys, rows_per_key)
    for schedule.order in range(7):
        assert_right(inputs, gluon_backward.backward(*inputs))


BROKEN = {
    "reduction dropped": each(r"@%p\d+ cp\.reduce\.async[^;]*;"),
    "a store in its place": each(r"cp\.reduce(\.async[^;]*)\.add", r"cp\1"),
    "reduction not committed": each(r"^\s*cp\.async\.bulk\.commit_group;"),
    "reduction not waited for": each(r"^\s*cp\.async\.bulk\.wait_group\.read\s+0;"),
    "one reduction too many in flight": each(r"(cp\.async\.bulk\.wait_group\.read\s+)0;", r"\g<1>1;"),
    "shared memory not fenced": each(r"^\s*fence\.proxy\.async\.shared::cta;"),
    "barrier of a group dropped": each(r"^\s*bar\.sync\s+\d+, 128;"),
    "product not fenced": each(r"^\s*wgmma\.fence\.sync\.aligned;"),
    "product not waited for": each(r"^\s*wgmma\.wait_group\.sync\.aligned \d+;"),
    "arrival dropped": each(r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];"),
}
# What is not caught: by line of the kernel, how many of the instructions that it became, and why.
MISSED = {
    "barrier of a group dropped": {
        # Warp 0 does what is in front of them and what is behind.
        "mbarrier.expect(kv_full, 2 * key.nbytes_per_cta)": 1,
        "tma.async_load(key, [block, 0], kv_full, k_tile)": 1,
        "tma.async_load(value, [block, 0], kv_full, v_tile)": 1,
        # The load of dO that this would let through waits for Q's arrival too, which comes behind.
        "mbarrier.arrive(do_empty.index(stage), count=1)": 2,
        # Behind the loop, where nobody touches shared memory any more.
        "tma.store_wait(0)": 2,
    },
    # Fenced by the product before; nothing has touched their registers since.
    "product not fenced": {
        "dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)": 2,
        "dq = warpgroup_mma(ds_tile.permute((1, 0)), k_columns, dq_zero, use_acc=False, is_async=True)": 2,
    },
    # As with the arrival of dO: the wait for dK, which comes behind, is one for dV.
    "product not waited for": {"dv = warpgroup_mma_wait(1, deps=[dv])": 2},
}


@pytest.fixture
def subject(emulated_launches) -> Subject:
    inputs = problem(512, 1)
    return Subject(
        gluon_backward, lambda: assert_right(inputs, gluon_backward.backward(*inputs)), emulated_launches
    )  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_caught(what, subject):
    assert subject.missed(BROKEN[what]) <= Counter(MISSED.get(what, {}))


def test_first_ones_are_caught(subject):
    for what in list(BROKEN)[:6]:
        _, ptx = next(BROKEN[what](subject.ptx))
        assert subject.is_caught(ptx), what
