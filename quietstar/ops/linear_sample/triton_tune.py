"""The candidates of ``python -m quietstar.ops.tune`` for sampling: tiles of the product with the head, by rows."""

import itertools
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quietstar.ops._launch_table import row_for, row_key
from quietstar.ops._tuning import Subject
from quietstar.ops.linear_sample import backend_triton
from quietstar.ops.linear_sample.backend_triton import MOST_ROWS, SAMPLE, TILES, Tile
from quietstar.ops.linear_sample.inputs import Sampling
from quietstar.ops.linear_sample.noise import GROUP

if TYPE_CHECKING:
    from quietstar.ops.tune import Sizes

TABLE = f"{backend_triton.__name__}.TILES"


def candidates(rows: int, shared_memory: int) -> list[Tile]:
    """Return half-precision tiles whose steps in flight fit ``shared_memory`` [bytes] and whose sums fit registers."""
    tiles = itertools.starmap(Tile, itertools.product((GROUP, 2 * GROUP), (32, 64, 128, 256), (4, 8), (2, 3, 4, 5, 6)))

    def fits(tile: Tile) -> bool:
        blocks = tile.num_stages * (tile.tokens + rows) * tile.step * 2
        return blocks <= shared_memory and tile.tokens * rows <= 64 * 32 * tile.num_warps

    return list(filter(fits, tiles))


def subjects(sizes: "Sizes") -> list[Subject]:
    """Return a draw for each number of rows that has its own tile."""
    make = partial(torch.randn, dtype=sizes.dtype, device=sizes.device)
    weight = make(sizes.vocabulary, sizes.hidden_size) * sizes.hidden_size**-0.5
    seed = torch.zeros((), dtype=torch.int64, device=sizes.device)
    sampling = Sampling(seed, temperature=1.0, softcap=None, suppress=None, top_k=None, top_p=None)

    def draw(hidden: Tensor) -> list[Tensor]:
        return [backend_triton.sample(hidden, weight, sampling)]

    def subject(rows: int) -> Subject:
        hidden = make(rows, sizes.hidden_size)
        return Subject(
            table=TABLE,
            rows=TILES,
            key=row_key(SAMPLE, hidden, rows),
            kernel="matmul_sample_kernel",
            present=row_for(TILES, SAMPLE, hidden, rows),
            candidates=candidates(rows, sizes.shared_memory),
            run=partial(draw, hidden),
            moved=weight.nbytes,
        )

    return [subject(rows) for rows in (16, 32, 64, MOST_ROWS)]
