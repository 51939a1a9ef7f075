"""What ptxas says of the CUDA kernels, on any machine that has nvcc: registers, shared memory, and nothing spilled."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
# The most registers a thread may have for the blocks that are meant to share a multiprocessor, which has 65536.
REGISTERS = {
    "mix_kernel": 64,  # 4 blocks of 256 threads
    "mix_backward_kernel": 64,
    "mixed_cross_entropy_kernel": 64,
    "mixed_cross_entropy_backward_kernel": 64,
    "cross_entropy_row_kernel": 64,  # one block of 1024
    "sample_kernel": 64,  # 4 blocks of 256
    "half_attention_kernel": 255,  # one block of 256, or more blocks of fewer
    "float_attention_kernel": 128,  # 4 blocks of 128
    "combine_kernel": 64,
}
SOURCES = {
    "mixing": (
        "mix_kernel", "mix_backward_kernel", "mixed_cross_entropy_kernel", "mixed_cross_entropy_backward_kernel",
    ),
    "linear_cross_entropy": ("cross_entropy_row_kernel",),
    "linear_sample": ("sample_kernel",),
    "thought_attention": ("half_attention_kernel", "float_attention_kernel", "combine_kernel"),
}  # fmt: skip
every_source = pytest.mark.parametrize("source", SOURCES)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
]


class Usage(NamedTuple):
    kernel: str
    architecture: str
    stack: int
    spilled: int
    registers: int


def nvcc(source, *options):
    command = ["nvcc", "-std=c++17", f"-I{ROOT / 'csrc/include'}", *options, str(ROOT / f"csrc/cuda/{source}.cu")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stderr


def usages(source, architecture, folder):
    report = nvcc(source, f"-arch={architecture}", "-Xptxas=-v", "-cubin", "-o", str(folder / "kernels.cubin"))
    assert not re.search(r"\bC75\d\d\b", report), report  # ptxas lets each wgmma wait for the one before
    entries = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        flags=re.DOTALL,
    )
    return [
        Usage(re.search(r"\d([a-z_]+_kernel)", name)[1], target, int(stack), int(stores) + int(loads), int(registers))
        for name, target, stack, stores, loads, registers in entries
    ]


@every_source
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(source, architecture, tmp_path):
    found = usages(source, architecture, tmp_path)
    assert {usage.kernel for usage in found} == set(SOURCES[source])
    for usage in found:
        assert usage.architecture == architecture
        assert usage.stack == usage.spilled == 0, usage
        assert usage.registers <= REGISTERS[usage.kernel], usage


INSTRUCTIONS = {
    "mixing": {kernel: [r"ld\.global\.v4\.[bu]32|ld\.global\.v4\.f32"] for kernel in SOURCES["mixing"]},
    "linear_cross_entropy": {"cross_entropy_row_kernel": [r"ld\.global\.v4\.f32|ld\.global\.v4\.[bu]32"]},
    "linear_sample": {"sample_kernel": [r"ld\.global\.v4\.f32|ld\.global\.v4\.[bu]32"]},
    "thought_attention": {
        "half_attention_kernel": [r"ldmatrix\.sync\.aligned\.m8n8\.x4", r"mma\.sync\.aligned\.m16n8k16"],
        "float_attention_kernel": [r"ld\.global\.v4\.f32|ld\.global\.v4\.[bu]32"],
    },
}


@every_source
def test_access_is_by_16_bytes_and_products_by_matrix_units(source, tmp_path):
    target = tmp_path / "kernels.ptx"
    nvcc(source, "-arch=compute_80", "-ptx", "-o", str(target))
    bodies = re.split(r"\.entry ", target.read_text())[1:]
    for kernel, wanted in INSTRUCTIONS[source].items():
        mine = [body for body in bodies if re.match(rf"\w*\d{kernel}", body)]
        aligned = [
            body for body in mine if not re.match(r"\w*cross_entropy_row_kernel\w*Lb0ELb", body)
        ]  # kernels for unaligned data aside
        assert aligned, kernel
        for body in aligned:
            assert all(re.search(pattern, body) for pattern in wanted), body[:100]
    if source == "thought_attention":
        copying = [body for body in bodies if "cp.async.cg.shared.global" in body]
        assert len(copying) == 4  # both dtypes, both head sizes
        for body in copying:
            assert_copies_go_on_by_additions(body)


def assert_copies_go_on_by_additions(body):
    """Where copies start, addresses are neither multiplied nor divided; most tiles are seen whole, and need no mask."""
    blocks = [block.split(";") for block in re.split(r"\n\$L\w+:", body) if "cp.async.cg" in block]
    assert not [line for block in blocks for line in block if re.search(r"\b(div|rem)\.|\b(mul|mad)\S*64", line)]
    per_copy = sorted(len(block) / sum("cp.async.cg" in line for line in block) for block in blocks)
    assert per_copy[0] < 10
    assert per_copy[-1] < 20
