"""What shows that broken kernels are caught: a call of thought attention whose PTX is changed on its way."""

import re

import torch
from thought_attention_cases import GPU_CASES, case
from tolerances import assert_as_accurate

from quietstar.ops import thought_attention

from .kernel import EmulationError


def replaced(pattern: str, replacement: str = "", which: int | None = None):
    """An edit of PTX: occurrences of ``pattern`` become ``replacement``, all or the one so numbered."""

    def edit(ptx: str) -> str:
        matches = list(re.finditer(pattern, ptx, re.M))
        assert matches, f"nothing to break: {pattern}"
        for match in [matches[which]] if which is not None else matches[::-1]:
            ptx = ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]
        return ptx

    return edit


def what_is_wrong(backend: str, launches: list, name: str = "D = 128, blocks of keys") -> list[str]:
    """All that shows a broken forward pass: faults of launches, which are cleared, and wrong numbers."""
    inputs, options = case(name, torch.bfloat16, cases=GPU_CASES)
    wrong = []

    def run(backend, dtype=torch.bfloat16):
        with torch.no_grad():
            return thought_attention(
                *(x.to(dtype) for x in inputs), **options, return_lse=True, backend=backend
            )  # fmt: skip

    try:
        results = run(backend), run("reference"), run("reference", torch.float64)
        for part, *values in zip(("output", "lse"), *results, strict=True):
            assert_as_accurate(*values, unit=torch.bfloat16, name=part)
    except (AssertionError, EmulationError) as error:
        wrong.append(str(error))
    wrong += [fault for launch in launches for fault in launch.faults()]
    launches.clear()
    return wrong
