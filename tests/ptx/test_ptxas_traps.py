"""What ptxas makes of small changes to a kernel in Gluon: why those lines stand where they stand, as machine code says.

The numbers would be right all the same, or the change is only there to be compiled.
"""

import re
import subprocess
from pathlib import Path

import pytest
from compile_kernels import compiled
from hopper_loops import loops

from ptx import gluon_forward
from ptx.emulated import needs_gluon
from ptx.sass_registers import assembled

pytestmark = [needs_gluon, pytest.mark.slow]

LAUNCH = """

def launch():
    keys, thoughts = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((1, 128, 1, 128), (1, 128, 4, 1, 128)))
    forward(torch.empty((1, 4, 128, 4, 128), dtype=torch.bfloat16), keys, keys, thoughts, thoughts)
"""
WAIT_FOR_VALUES = "    mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)\n"
WAIT_FOR_PRODUCT = "    acc, probability = warpgroup_mma_wait(0, deps=[acc, probability])\n"
SCALE = "    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout)), 1)\n"


def main_loop(folder, *changes):
    """The loop over whole blocks with some of its source replaced, and what ptxas says of products."""
    source = Path(gluon_forward.__file__).read_text()
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    script = folder / "changed.py"
    script.write_text(source + LAUNCH)
    [kernel] = compiled(str(script), "launch", (90,))[90]
    found = [loop for loop in loops(assembled(kernel.ptx, 90)) if loop.exponentials > 60]
    return min(found, key=lambda loop: loop.size), warnings(kernel.ptx, folder)


def warnings(ptx, folder):
    from triton.backends.nvidia.compiler import get_ptxas

    (folder / "kernel.ptx").write_text(ptx)
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=folder, check=True, stderr=subprocess.PIPE, text=True).stderr
    return set(re.findall(r"\bC75\d\d\b", said))


def test_as_it_is(tmp_path):
    loop, said = main_loop(tmp_path)
    assert said == set()
    assert loop.products_under_exponentials() == 1


def test_a_wait_with_no_branch_in_front_is_moved_above_the_exponentials(tmp_path):
    """The wait for the values' mbarrier is such a branch."""
    both = WAIT_FOR_VALUES + WAIT_FOR_PRODUCT
    loop, said = main_loop(tmp_path, (both, WAIT_FOR_PRODUCT + WAIT_FOR_VALUES))
    assert said == set()
    assert loop.products_under_exponentials() == 0


def test_a_product_in_flight_at_the_end_of_a_loop_serialises_all(tmp_path):
    loop, said = main_loop(tmp_path, (WAIT_FOR_PRODUCT, WAIT_FOR_PRODUCT.replace("(0", "(1")), (SCALE, ""))
    assert len(said) == 1  # C7512, or C7514
    assert loop.products_under_exponentials() == 0
