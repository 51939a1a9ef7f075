"""How many registers the code of a kernel uses in each of the parts that set a number of them by setmaxnreg.

ptxas gives registers to each part within the number that stands in front of it: where a part needs more it spills, or
lets no products overlap, and says so.
"""

import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*\w+\*/\s+(.*?);\s*(.*)$")
_TARGETS = re.compile(r"\.L_x_\d+")
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x\d+\.F32\S*\s+R(\d+)")  # N / 2 accumulators from the register it names


def assembled(ptx: str, architecture: int) -> str:
    """The machine code of a PTX module in nvdisasm's words."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", ptx, re.M)[1]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        subprocess.run([get_ptxas(architecture).path, f"--gpu-name={target}", source, "-o", cubin], check=True)
        command = [knobs.nvidia.nvdisasm.path, "-c", cubin]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def registers_used(sass: str, at_start: int) -> dict[int, int]:
    """By the number of registers that a thread has there: how many are used at the least, by the highest one named.

    Args:
        sass: of one kernel, as ``assembled`` gives it.
        at_start: registers of a thread when the kernel begins.
    """
    instructions, labels = [], {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction[1] + instruction[2])  # the second: a table of targets
    used, seen, todo = defaultdict(int), set(), [(0, at_start)]
    while todo:
        place, limit = todo.pop()
        if (place, limit) in seen or place == len(instructions):
            continue
        seen.add((place, limit))
        text = instructions[place]
        if re.search(r"\b(CALL|RET|JMP|JMX)\b", text):
            raise NotImplementedError(f"the way of this is not followed: {text}")
        used[limit] = max(used[limit], _highest(text) + 1)
        if "USETMAXREG" in text:
            limit = int(re.search(r"0x\w+", text)[0], 16)
        if not re.match(r"(EXIT|BRXU? |BRA(\.U)? `)", text):
            todo.append((place + 1, limit))
        if not text.startswith("BSSY"):
            todo += [(labels[label], limit) for label in _TARGETS.findall(text)]
    return dict(used)


def _highest(text: str) -> int:
    numbers = [int(number) for number in re.findall(r"\bR(\d+)\b", text)]
    if product := _PRODUCT.search(text):
        numbers.append(int(product[2]) + int(product[1]) // 2 - 1)
    return max(numbers, default=-1)


def limits_kept(ptx: str, registers: int) -> set[int]:
    """The numbers that a kernel of ``registers`` sets by setmaxnreg; no part of its machine code may have more."""
    used = registers_used(assembled(ptx, 90), registers)
    assert all(count <= limit for limit, count in used.items()), used
    return {int(count) for count in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)}
