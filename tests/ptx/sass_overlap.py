"""Whether exponentials run under products, in machine code as ``sass_registers.assembled`` gives it.

A group of wgmma (HGMMA) ends with the one that counts up the scoreboard gsb0; ``WARPGROUP.DEPBAR.LE gsb0, n`` waits
until at most n groups are in flight.
"""

import re
from typing import NamedTuple

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*\w+\*/\s+(?:@!?U?P\w+\s+)?(.*?);")
_BRANCH = re.compile(r"^BRA\S*\s.*`\((\.L_x_\d+)\)")


class Loop(NamedTuple):
    """The body of a loop that has no other in it."""

    instructions: int
    products: int
    """wgmma."""
    exponentials: int
    overlapped: int
    """Exponentials that are issued with a group of products in flight."""
    spills: int
    """Accesses to the stack."""


def loops(sass: str) -> list[Loop]:
    """Innermost loops, in their order."""
    instructions, labels = [], {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction[1])
    backward = []
    for end, text in enumerate(instructions):
        branch = _BRANCH.match(text)
        if branch and labels[branch[1]] <= end:
            backward.append((labels[branch[1]], end))
    innermost = [
        (begin, end)
        for begin, end in sorted(backward)
        if not any(begin <= other[0] and other[1] <= end and other != (begin, end) for other in backward)
    ]
    return [_read(instructions[begin : end + 1]) for begin, end in innermost]


def _read(body: list[str]) -> Loop:
    products = exponentials = overlapped = spills = in_flight = 0
    for text in body:
        if text.startswith("HGMMA"):
            products += 1
            in_flight += "gsb0" in text
        elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", text):
            in_flight = min(in_flight, int(wait[1], 16))
        elif text.startswith("MUFU.EX2"):
            exponentials += 1
            overlapped += in_flight > 0
        spills += text.startswith(("LDL", "STL"))
    return Loop(len(body), products, exponentials, overlapped, spills)
