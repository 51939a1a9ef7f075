"""The backends that run on a CPU, as parameters of tests."""

from collections.abc import Sequence

import pytest
import torch

from quietstar.ops import _native
from quietstar.ops._availability import interpreted

_COMPILED = pytest.mark.skipif(_native._C is None, reason="needs the compiled module: `pip install .` builds it")
_CPU = pytest.param("cpu", marks=_COMPILED)

ANY_DTYPE = ["reference", "torch"]
FAST = ["torch", _CPU]
ALL = ["reference", *FAST]


def with_dtypes(dtypes: Sequence[torch.dtype], backends: Sequence[str] = ("reference", "torch", "cpu")) -> list:
    """The pairs (backend, dtype) that can run."""
    return [
        pytest.param(backend, dtype, id=f"{backend}-{dtype}", marks=_COMPILED if backend == "cpu" else ())
        for backend in backends
        for dtype in dtypes
        if backend != "cpu" or dtype in (torch.float32, torch.bfloat16)
    ]


def triton_dtypes() -> list[torch.dtype]:
    """What Triton's kernels can be tested with; its interpreter cannot round to bfloat16."""
    return [torch.float32, torch.float16] + [torch.bfloat16] * (not interpreted())


def with_triton_dtypes(names: Sequence[str]) -> list:
    """The pairs (name of a case, dtype): all in bfloat16, interpreted in float32; in each other dtype its own third."""
    all_of_them, *others = sorted(triton_dtypes(), key=[torch.bfloat16, torch.float32, torch.float16].index)
    pairs = [(name, all_of_them) for name in names]
    pairs += [(name, dtype) for third, dtype in enumerate(others) for name in names[third::3]]
    return [pytest.param(name, dtype, id=f"{name}-{dtype}") for name, dtype in pairs]
