"""Launch parameters of the Triton kernels of thought attention.

``TILES`` is a table by kernel, architecture, element size and padded head size, with a reason for every row. Nothing is
tuned while a program runs. No row has been timed on a GPU yet.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from quietstar.ops._triton import interpreted


class Tile(NamedTuple):
    """Launch parameters of one kernel."""

    block_m: int
    """Query rows a program holds, or takes in one step of its loop."""
    block_n: int
    """Keys a program holds, or takes in one step of its loop."""
    num_warps: int
    num_stages: int
    """Steps of the loop whose loads are in flight; each costs shared memory."""


FORWARD, DECODE, QUERY_GRADIENT, KEY_GRADIENT = "forward", "decode", "query gradient", "key gradient"
HOPPER, BLACKWELL, AMPERE, COMPACT, INTERPRETER = "hopper", "blackwell", "ampere", "compact", "interpreter"

TILES: dict[tuple[str, str, int, int], Tile] = {}

# A decoding program takes at least this many keys: for fewer, starting it and adding up its result cost more.
SPLIT_KEYS = 256
# A program of the key gradient takes at least this many rows, for the same reason.
SPLIT_ROWS = 1024


def architecture() -> str:
    """The family of launch parameters for the current device."""
    if interpreted():
        return INTERPRETER
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return COMPACT
    return {80: AMPERE, 87: AMPERE, 90: HOPPER, 100: BLACKWELL, 103: BLACKWELL}.get(target.arch, COMPACT)


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run at the same time, at the least."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def padded_head(head_size: int) -> int:
    """The power of two that a head is padded to: tiles have no other sizes."""
    return max(16, power_of_2(head_size))


def tile_for(kernel: str, query: Tensor) -> Tile:
    """The table's row for a kernel on the device, dtype and head size of ``query``."""
    family = architecture()
    if family == INTERPRETER:
        return Tile(64, 32, num_warps=4, num_stages=1)
    return TILES[kernel, family, query.element_size(), max(64, padded_head(query.shape[-1]))]


def edge(block: int) -> int:
    """The size of masked blocks: half of the others, because on average half of such a block is waste."""
    return max(16, block // 2)


def forward_launch(query: Tensor, rows: int, heads: int, length: int) -> tuple[Tile, int]:
    """Tile of the forward, and over how many programs its keys are split.

    Args:
        query: sets device, dtype and head size.
        rows: P·S·G, query rows of one key/value head.
        heads: B·Hkv.
        length: L.
    """
    tile = tile_for(FORWARD, query)
    if rows < tile.block_m:
        tile = tile_for(DECODE, query)
        tile = tile._replace(block_m=16 if rows <= 16 else tile.block_m)
    programs = heads * -(-rows // tile.block_m)
    return tile, _splits(query, tile, programs, -(-length // SPLIT_KEYS))


def key_gradient_launch(query: Tensor, rows: int, heads: int, length: int) -> tuple[Tile, int]:
    """Tile of the gradient of base keys, and over how many programs its rows are split; see ``forward_launch``."""
    tile = tile_for(KEY_GRADIENT, query)
    programs = heads * -(-length // tile.block_n)
    return tile, _splits(query, tile, programs, -(-rows // SPLIT_ROWS))


def _splits(query: Tensor, tile: Tile, programs: int, most: int) -> int:
    """Into how many to split programs that are too few to fill the device; 1 if they are not."""
    resident = processors(query.device) * max(1, 8 // tile.num_warps)
    return max(1, min(resident // max(1, programs), most))


def thought_gradient_tile(query: Tensor, rows: int, thought_steps: int) -> Tile:
    """Tile of the gradient of thought keys, ``rows`` = S·G to an anchor: no larger than a thought needs."""
    block_n = max(16, min(64, power_of_2(thought_steps)))
    together = max(1, block_n // thought_steps)
    block_m = max(16, min(64 if query.element_size() == 2 else 16, power_of_2(together * rows)))
    return Tile(block_m, block_n, num_warps=4, num_stages=2)


class Piece(NamedTuple):
    """How a tile is cut for its thought keys: see ``triton_tiles``."""

    rows: int
    anchors: int
    """The most anchors that the rows of a piece belong to."""
    block_t: int
    """Thought keys that a piece takes in one step."""


def cut(rows: int, thought_steps: int, block_m: int) -> Piece:
    """The cheapest pieces for tiles of ``block_m`` rows, with ``rows`` = S·G to an anchor.

    Either one piece, whose matrix products take the fastest path, or pieces of 16 rows, the smallest there are, in a
    batched product at about half that speed.
    """

    def into(piece: int, widest: int) -> Piece:
        # Tiles start at multiples of the piece, so within an anchor a piece starts at multiples of their gcd.
        anchors = (rows - math.gcd(rows, piece) + piece - 1) // rows + 1
        return Piece(piece, anchors, max(16, min(widest, power_of_2(anchors * thought_steps))))

    def columns(piece: Piece) -> int:
        return -(-piece.anchors * thought_steps // piece.block_t) * piece.block_t

    whole, small = into(block_m, 64), into(16, 16)
    return whole if block_m == 16 or columns(whole) <= 2 * columns(small) else small


def power_of_2(least: int) -> int:
    """The smallest power of two that is not below ``least``."""
    return 1 << (least - 1).bit_length()
