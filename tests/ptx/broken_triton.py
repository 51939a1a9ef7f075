"""Broken Triton kernels are caught; for `pytest --emulate` alone, which test_emulated_attention.py starts."""

import re

from ptx import triton_launches
from ptx.broken import replaced, what_is_wrong

BROKEN = {
    "waits for copies dropped": replaced(r"^\s*cp\.async\.wait_group\s+\d+;"),
    "one group of copies too many may be pending": lambda ptx: re.sub(
        r"cp\.async\.wait_group\s+(\d+);", lambda match: f"cp.async.wait_group {int(match[1]) + 1};", ptx
    ),
    "barriers dropped": replaced(r"^\s*bar\.sync\s+0;"),
}
ONLY = {
    "sm_80": {
        "matrices not transposed": replaced(r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans", r"\1"),
        "matrices transposed": replaced(r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.shared", r"\1.trans.shared"),
    },
    "sm_90": {
        "products not waited for": replaced(r"^\s*wgmma\.wait_group\.sync\.aligned \d+;"),
        "products not fenced": replaced(r"^\s*wgmma\.fence\.sync\.aligned;"),
        "shared memory not fenced": replaced(r"^\s*fence\.proxy\.async[^;]*;"),
    },
    "sm_100": {
        "products not waited for": replaced(r"@!complete bra\.uni waitLoop;"),
        "products not committed": replaced(r"@%p\d+ tcgen05\.commit[^;]*;"),
        "shared memory not fenced": replaced(r"^\s*fence\.proxy\.async[^;]*;"),
        "loads from tensor memory not waited for": replaced(r"^\s*tcgen05\.wait::ld[^;]*;"),
        "stores to tensor memory not waited for": replaced(r"^\s*tcgen05\.wait::st[^;]*;"),
        "tensor memory kept": replaced(r"@%p\d+ tcgen05\.dealloc[^;]*;"),
        "too little tensor memory": replaced(r"(tcgen05\.(?:de)?alloc[^;]*), \d+;", r"\1, 32;"),
        "the first columns of A again and again": replaced(r"(tcgen05\.mma[^,]*, \[ %r\d+ \+) \d+", r"\1 0"),
        "one product left out": replaced(r"@%p\d+ tcgen05\.mma[^;]*;", which=1),
        "every product starts anew": replaced(r"(tcgen05\.mma[^;]*), %p\d+;", r"\1, 0;"),
        "halves of 64 rows too near": replaced(r"(tcgen05\.ld\.[^;]*\]), \d+;", r"\1, 8;"),
    },
}


def pytest_generate_tests(metafunc):
    if "edit" in metafunc.fixturenames:
        edits = BROKEN | ONLY[metafunc.config.getoption("--emulate")]
        metafunc.parametrize("edit", edits.values(), ids=edits)


def test_the_unbroken_one_is_right(emulated_launches):
    assert what_is_wrong("triton", emulated_launches) == []


def test_caught(edit, monkeypatch, emulated_launches):
    def broken(kernel, ptx):
        return edit(ptx) if kernel == "forward_kernel" else ptx

    monkeypatch.setattr(triton_launches.state, "edit", broken)
    wrong = what_is_wrong("triton", emulated_launches)
    print(*wrong, sep="\n")
    assert wrong
