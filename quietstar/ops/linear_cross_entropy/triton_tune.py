"""The candidates of ``python -m quietstar.ops.tune`` for the linear cross-entropies: threads and blocks per row."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quietstar.ops._launch_table import row_for, row_key
from quietstar.ops._tuning import Subject
from quietstar.ops._vocabulary import Softmax
from quietstar.ops.linear_cross_entropy import backend_triton
from quietstar.ops.linear_cross_entropy.backend_triton import (
    LAUNCHES,
    MIX_HIDDEN,
    RESIDENT,
    SPLIT_GRADIENT,
    STREAMING,
    STREAMING_WIDE,
    Launch,
)
from quietstar.ops.linear_cross_entropy.inputs import Scales

if TYPE_CHECKING:
    from quietstar.ops.tune import Sizes

TABLE = f"{backend_triton.__name__}.LAUNCHES"
CANDIDATES = [Launch(*numbers) for numbers in itertools.product((4, 8, 16, 32), (4, 8, 16, 32))]
_OF_WHOLE_ROWS = [Launch(16, warps) for warps in (8, 16, 32)]  # rows are taken whole: only the number of warps matters
_LONG = 128256  # a vocabulary whose rows do not fit the registers of a program
_LOGITS_BYTES = 1 << 30


def subjects(sizes: "Sizes") -> list[Subject]:
    """Return calls for rows of logits, short ones that stay in registers and long ones, and mixing of hidden states."""
    longer = max(_LONG, sizes.vocabulary)
    return [
        _rows(RESIDENT, min(sizes.vocabulary, 32768), False, sizes),
        _rows(STREAMING, longer, False, sizes),
        _rows(STREAMING_WIDE, longer, True, sizes),
        *_hidden(sizes),
    ]


def _subject(kernel: str, tensor: Tensor, run: Callable, moved: float, checked: Callable | None = None) -> Subject:
    row, rows = row_for(LAUNCHES, kernel, tensor), _OF_WHOLE_ROWS if kernel == RESIDENT else CANDIDATES
    function = f"{kernel.removesuffix(' wide').replace(' ', '_')}_kernel"
    return Subject(TABLE, LAUNCHES, row_key(kernel, tensor), function, row, rows, run, moved=moved, checked=checked)


def _rows(kernel: str, vocabulary: int, entropy: bool, sizes: "Sizes") -> Subject:
    rows = max(1, min(sizes.rows, _LOGITS_BYTES // (4 * vocabulary)))
    logits = torch.randn(rows, vocabulary, device=sizes.device)
    target = torch.randint(vocabulary, (rows,), device=sizes.device)
    scales = Scales(torch.rand(rows, device=sizes.device), torch.rand(rows, device=sizes.device) if entropy else None)
    softmax = Softmax(1.0, None, None)

    def run(logits: Tensor) -> list[Tensor]:
        result = backend_triton.cross_entropy_rows(logits, softmax, target, scales, entropy, sizes.dtype)
        return [tensor for tensor in result if tensor is not None]

    def checked() -> list[Tensor]:
        return run(logits.clone())

    # The gradient overwrites the logits, but reading it as logits takes as long.
    moved = logits.nbytes * (2 if kernel != RESIDENT else 1) + logits.numel() * sizes.dtype.itemsize
    return _subject(kernel, logits, partial(run, logits.clone()), moved, checked)


def _hidden(sizes: "Sizes") -> list[Subject]:
    base, thought = torch.randn(2, sizes.rows, sizes.hidden_size, dtype=sizes.dtype, device=sizes.device)
    gradient = torch.randn(base.shape, device=sizes.device)
    weight = torch.rand(sizes.rows, device=sizes.device)
    mixed = backend_triton.MixedHidden(base, thought, weight, None, [True, True, True])
    rows = slice(0, sizes.rows)

    def split() -> list[Tensor]:
        mixed.write_gradient(rows, gradient)
        return list(mixed.gradients())

    return [
        _subject(MIX_HIDDEN, base, lambda: [mixed.read(rows)], 3 * base.nbytes),
        _subject(SPLIT_GRADIENT, base, split, 4 * base.nbytes + gradient.nbytes),
    ]
