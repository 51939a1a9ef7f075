"""Whether the code of warp-specialised kernels fits the registers that it sets by setmaxnreg, as ptxas makes it."""

import re
from pathlib import Path

import pytest
from compile_kernels import Kernel, compiled, is_serialised

from ptx.emulated import needs_gluon
from ptx.sass_registers import assembled, registers_used

pytestmark = [needs_gluon, pytest.mark.slow]


def launched(function: str) -> Kernel:
    (kernel,) = compiled(str(Path(__file__).with_name("gluon_launches.py")), function, (90,))[90]
    return kernel


def used_of_limits(kernel: Kernel) -> dict[int, int]:
    """Registers by the numbers that are set, each of which must be in the machine code, and none be exceeded."""
    limits = {int(count) for count in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", kernel.ptx)}
    used = registers_used(assembled(kernel.ptx, 90), kernel.registers)
    assert used.keys() == limits | {kernel.registers}
    assert all(count <= limit for limit, count in used.items()), used
    return used


@pytest.mark.parametrize("function", ["forward", "forward_with:240"])
def test_enough(function):
    """240 for the consumers, 24 for the producer."""
    kernel = launched(function)
    assert used_of_limits(kernel).keys() >= {240, 24}
    assert kernel.spilled == 0
    assert not is_serialised(kernel)


def test_too_few():
    kernel = launched("forward_with:96")
    assert used_of_limits(kernel)[96] > 80
    assert kernel.spilled > 0
    assert is_serialised(kernel)
