"""Broken CUDA kernels are caught; for `pytest --emulate` alone, which test_emulated_cuda.py starts."""

import re

import pytest
import simt

from ptx import cuda_launches
from ptx.broken import replaced, what_is_wrong

KERNEL = "half_attention_kernelINS0_8BFloat16ELi128ELb1E"
LAST_BARRIER = r"bar\.sync\s+0;(?![\s\S]*bar\.sync)"
BROKEN = {
    "waits for copies dropped": replaced(r"cp\.async\.wait_group\s+\d+;"),
    "one group of copies too many may be pending": lambda ptx: re.sub(
        r"cp\.async\.wait_group\s+(\d+);", lambda match: f"cp.async.wait_group {int(match[1]) + 1};", ptx
    ),
    "barriers dropped": replaced(r"bar\.sync\s+0;"),
    "the loop's last barrier dropped": replaced(LAST_BARRIER),
    "matrices not transposed": replaced(r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans", r"\1"),
    "matrices transposed": replaced(r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.shared", r"\1.trans.shared"),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    simt.use_cuda_kernels(monkeypatch)


def in_the_kernel(edit):
    """The edit for one kernel of a module alone."""

    def edit_module(ptx: str) -> str:
        if KERNEL not in ptx:
            return ptx
        start = re.search(rf"\.entry \w*{KERNEL}", ptx).start()
        end = ptx.find(".entry ", start + 1)
        return ptx[:start] + edit(ptx[start:end]) + ptx[end:]

    return edit_module


def test_the_unbroken_one_is_right(emulated_launches):
    assert what_is_wrong("cuda", emulated_launches) == []


@pytest.mark.parametrize("name", BROKEN)
def test_caught(name, monkeypatch, emulated_launches):
    monkeypatch.setattr(cuda_launches.state, "edit", in_the_kernel(BROKEN[name]))
    wrong = what_is_wrong("cuda", emulated_launches)
    print(*wrong, sep="\n")
    assert wrong
