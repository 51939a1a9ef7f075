"""The candidates of ``python -m quietstar.ops.tune`` for mixing: how much of a row a program takes at a time."""

import itertools
from functools import partial
from typing import TYPE_CHECKING

import torch

from quietstar.ops._launch_table import row_for, row_key
from quietstar.ops._tuning import Subject
from quietstar.ops.mixing import backend_triton
from quietstar.ops.mixing.backend_triton import (
    BLOCKS,
    CROSS_ENTROPY,
    CROSS_ENTROPY_BACKWARD,
    MIX,
    MIX_BACKWARD,
    Block,
)
from quietstar.ops.mixing.backends import Mix

if TYPE_CHECKING:
    from quietstar.ops.tune import Sizes

TABLE = f"{backend_triton.__name__}.BLOCKS"


def subjects(sizes: "Sizes") -> list[Subject]:
    """Return every kernel with a call that moves logits and little else."""
    make = partial(torch.randn, sizes.rows, dtype=sizes.dtype, device=sizes.device)
    mix = Mix(make(sizes.vocabulary), make(sizes.vocabulary), make().float())
    target = torch.randint(sizes.vocabulary, (sizes.rows,), device=sizes.device)
    result = backend_triton.cross_entropy(mix, target)
    scale, grad = torch.rand_like(mix.weight), torch.randn_like(mix.base)
    # Kernels, whether they loop, the calls that launch them, and how many tensors of logits they read and write.
    calls = {
        MIX: (False, lambda: [backend_triton.mix(mix)], 3),
        MIX_BACKWARD: (True, partial(backend_triton.mix_backward, grad, mix, [True, True, True]), 5),
        CROSS_ENTROPY: (True, partial(backend_triton.cross_entropy, mix, target), 2),
        CROSS_ENTROPY_BACKWARD: (
            False,
            partial(backend_triton.cross_entropy_backward, scale, mix, target, result, [True, True]),
            4,
        ),
    }
    return [
        Subject(
            table=TABLE,
            rows=BLOCKS,
            key=row_key(kernel, mix.base),
            kernel=f"{kernel.replace(' ', '_')}_kernel",
            present=row_for(BLOCKS, kernel, mix.base),
            candidates=[
                Block(*numbers)
                for numbers in itertools.product((2048, 4096, 8192, 16384), (4, 8, 16), (1, 2, 3, 4) if loops else (1,))
            ],
            run=run,
            moved=tensors * mix.base.nbytes,
        )
        for kernel, (loops, run, tensors) in calls.items()
    ]
