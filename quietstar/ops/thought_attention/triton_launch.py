"""Launch parameters of the Triton kernels of thought attention.

``TILES`` is a table by kernel, architecture, element size and padded head size (see ``_launch_table``). Nothing is
tuned while a program runs: ``python -m quietstar.ops.tune`` times candidates on the GPU at hand, on demand, and prints
rows to put here. No row has been timed yet; in half precision none spills registers, with Triton 3.6 some at most four,
as ``tests/ops/test_thought_attention_compile.py`` compiles them.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from quietstar.ops import _launch_table
from quietstar.ops._launch_table import AMPERE, ANY, BLACKWELL, COMPACT, HOPPER, INTERPRETER
from quietstar.ops.thought_attention.triton_order import Order


class Tile(NamedTuple):
    """Launch parameters of one kernel."""

    block_m: int
    """Query rows a program holds, or takes in one step of its loop."""
    block_n: int
    """Keys a program holds, or takes in one step of its loop."""
    num_warps: int
    num_stages: int
    """Steps of the loop whose loads are in flight; each costs shared memory."""

    def options(self) -> dict[str, int]:
        """What a launch passes on to the compiler; fused multiply-adds by name, since Triton's default is to change."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


FORWARD, DECODE, QUERY_GRADIENT, KEY_GRADIENT = "forward", "decode", "query gradient", "key gradient"

# (kernel, architecture, bytes of an element, padded head size). Larger tiles read less from the L2 cache; what limits
# them are registers (8 warps have 255 a thread) and shared memory.
TILES: dict[tuple[str, str, int, int], Tile] = {
    # Hopper: 227 KiB of shared memory, and wgmma, which takes 64 rows a warp group. Two groups share each block of
    # keys; the running output (queries: dQ) of 128 rows fills half of their registers at D = 128.
    (FORWARD, HOPPER, 2, 64): Tile(128, 128, 8, 3),
    (FORWARD, HOPPER, 2, 128): Tile(128, 128, 8, 3),
    (FORWARD, HOPPER, 2, 256): Tile(64, 32, 8, 2),
    (QUERY_GRADIENT, HOPPER, 2, 64): Tile(128, 64, 8, 3),
    (QUERY_GRADIENT, HOPPER, 2, 128): Tile(128, 64, 8, 3),
    (QUERY_GRADIENT, HOPPER, 2, 256): Tile(32, 64, 8, 1),  # wgmma, from 64 rows on, would spill
    # The key gradient keeps two sums, dK and dV, so it is the keys that come in blocks of 128.
    (KEY_GRADIENT, HOPPER, 2, 64): Tile(64, 128, 8, 3),
    (KEY_GRADIENT, HOPPER, 2, 128): Tile(64, 128, 8, 3),
    (KEY_GRADIENT, HOPPER, 2, 256): Tile(64, 32, 8, 2),
    # Blackwell: sums live in tensor memory, but Triton carries them through registers around each product.
    (FORWARD, BLACKWELL, 2, 64): Tile(128, 64, 8, 3),
    (FORWARD, BLACKWELL, 2, 128): Tile(128, 64, 8, 3),  # blocks of 128 keys spill in the masked loop
    (FORWARD, BLACKWELL, 2, 256): Tile(64, 32, 8, 2),
    (QUERY_GRADIENT, BLACKWELL, 2, 64): Tile(128, 64, 8, 2),
    (QUERY_GRADIENT, BLACKWELL, 2, 128): Tile(128, 64, 8, 2),
    (QUERY_GRADIENT, BLACKWELL, 2, 256): Tile(32, 64, 8, 1),
    (KEY_GRADIENT, BLACKWELL, 2, 64): Tile(64, 128, 8, 3),
    (KEY_GRADIENT, BLACKWELL, 2, 128): Tile(64, 128, 8, 3),  # with 2 stages Triton 3.6 spills, in as much memory
    (KEY_GRADIENT, BLACKWELL, 2, 256): Tile(32, 64, 8, 2),
    # Ampere: 163 KiB. mma.sync takes both operands from registers, so blocks are half as large, and each warp reads all
    # of the other operand from shared memory: it should hold as many rows (key gradient: keys) as its registers can.
    (FORWARD, AMPERE, 2, 64): Tile(128, 32, 4, 3),
    (FORWARD, AMPERE, 2, 128): Tile(128, 32, 8, 3),
    (FORWARD, AMPERE, 2, 256): Tile(64, 32, 8, 2),
    (QUERY_GRADIENT, AMPERE, 2, 64): Tile(128, 32, 4, 2),
    (QUERY_GRADIENT, AMPERE, 2, 128): Tile(128, 32, 8, 2),
    (QUERY_GRADIENT, AMPERE, 2, 256): Tile(32, 32, 8, 1),
    (KEY_GRADIENT, AMPERE, 2, 64): Tile(64, 128, 8, 3),
    (KEY_GRADIENT, AMPERE, 2, 128): Tile(32, 128, 8, 2),
    (KEY_GRADIENT, AMPERE, 2, 256): Tile(32, 64, 8, 2),
    # Everything else, as Ampere with 99 KiB: GeForce, workstation cards, inference cards.
    (FORWARD, COMPACT, 2, 64): Tile(128, 32, 4, 3),
    (FORWARD, COMPACT, 2, 128): Tile(64, 64, 8, 2),
    (FORWARD, COMPACT, 2, 256): Tile(64, 32, 8, 1),
    (QUERY_GRADIENT, COMPACT, 2, 64): Tile(128, 32, 4, 2),
    (QUERY_GRADIENT, COMPACT, 2, 128): Tile(128, 32, 8, 2),
    (QUERY_GRADIENT, COMPACT, 2, 256): Tile(32, 32, 8, 1),
    (KEY_GRADIENT, COMPACT, 2, 64): Tile(64, 128, 8, 2),
    (KEY_GRADIENT, COMPACT, 2, 128): Tile(64, 64, 8, 2),
    (KEY_GRADIENT, COMPACT, 2, 256): Tile(32, 32, 4, 1),
    # Decoding waits for memory: few rows, small programs so that several run on a multiprocessor, loads far ahead.
    (DECODE, ANY, 2, 64): Tile(64, 64, 4, 3),
    (DECODE, ANY, 2, 128): Tile(64, 64, 4, 3),
    (DECODE, ANY, 2, 256): Tile(64, 32, 4, 2),
    # float32 at full precision has no tensor cores: both operands of a product sit in registers, so tiles are small,
    # and some spill a few registers all the same.
    (FORWARD, ANY, 4, 64): Tile(32, 32, 8, 2),
    (FORWARD, ANY, 4, 128): Tile(16, 32, 8, 2),
    (FORWARD, ANY, 4, 256): Tile(16, 16, 8, 1),
    (DECODE, ANY, 4, 64): Tile(32, 32, 8, 2),
    (DECODE, ANY, 4, 128): Tile(16, 32, 8, 2),
    (DECODE, ANY, 4, 256): Tile(16, 16, 8, 1),
    (QUERY_GRADIENT, ANY, 4, 64): Tile(16, 32, 8, 2),
    (QUERY_GRADIENT, ANY, 4, 128): Tile(16, 16, 8, 1),
    (QUERY_GRADIENT, ANY, 4, 256): Tile(16, 16, 8, 1),
    (KEY_GRADIENT, ANY, 4, 64): Tile(32, 32, 8, 2),
    (KEY_GRADIENT, ANY, 4, 128): Tile(32, 32, 8, 2),
    (KEY_GRADIENT, ANY, 4, 256): Tile(16, 16, 8, 1),
}

# A decoding program takes at least this many keys: for fewer, starting it and adding up its result cost more.
SPLIT_KEYS = 256
# A program of the key gradient takes at least this many rows, for the same reason.
SPLIT_ROWS = 512
# Blocks of a head that are in flight in the key gradient; see ``triton_order``. A block of 128 keys alone takes 256
# FLOPs per byte of its rows, and so many of them far more than a GPU has to do for one from memory.
SHARED = 4


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run at the same time, at the least."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Of the L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def padded_head(head_size: int) -> int:
    """The power of two that a head is padded to: tiles have no other sizes."""
    return max(16, power_of_2(head_size))


def row_key(kernel: str, vectors: Tensor) -> tuple[str, str, int, int]:
    """The key in ``TILES`` of a kernel on the device, dtype and head size of ``vectors``, the largest there are."""
    return _launch_table.row_key(kernel, vectors, vectors.element_size(), max(64, padded_head(vectors.shape[-1])))


def tile_for(kernel: str, vectors: Tensor) -> Tile:
    """The table's row for a kernel; ``vectors`` are those of ``row_key``."""
    kernel, family, *width = row_key(kernel, vectors)
    if family == INTERPRETER:
        return Tile(64, 32, num_warps=4, num_stages=1)
    return TILES.get((kernel, family, *width)) or TILES[kernel, ANY, *width]


def edge(block: int) -> int:
    """The size of masked blocks: half of the others, because on average half of such a block is waste."""
    return max(16, block // 2)


def forward_launch(vectors: Tensor, rows: int, heads: int, length: int) -> tuple[Tile, Order]:
    """Tile of the forward, and the order of its programs; few rows have their keys split over several.

    Args:
        vectors: query or value, whichever has the larger heads; sets device, dtype and head size.
        rows: P·S·G, query rows of one key/value head.
        heads: B·Hkv.
        length: L.
    """
    tile = tile_for(FORWARD, vectors)
    if rows < tile.block_m:
        tile = tile_for(DECODE, vectors)
        tile = tile._replace(block_m=16 if rows <= 16 else tile.block_m)
    blocks = -(-rows // tile.block_m)
    splits = min(_resident(vectors, tile) // (blocks * heads), -(-length // SPLIT_KEYS))
    return tile, Order.of(blocks, heads, max(1, splits), _heads_in_cache(vectors, length))


def query_gradient_launch(vectors: Tensor, rows: int, heads: int, length: int) -> tuple[Tile, Order]:
    """Tile of the gradient of the queries, and the order of its programs; see ``forward_launch``."""
    tile = tile_for(QUERY_GRADIENT, vectors)
    return tile, Order.of(-(-rows // tile.block_m), heads, 1, _heads_in_cache(vectors, length))


def key_gradient_launch(vectors: Tensor, rows: int, heads: int, length: int) -> tuple[Tile, Order]:
    """Tile of the gradient of base keys, and the order of its programs; see ``forward_launch``.

    Rows are split until there are two programs for each that can run: the longest is then with the shortest, and none
    waits long. More would add up more partial gradients to no end.
    """
    tile = tile_for(KEY_GRADIENT, vectors)
    blocks, resident = -(-length // tile.block_n), _resident(vectors, tile)
    splits = min(2 * resident // (blocks * heads), -(-rows // SPLIT_ROWS))
    return tile, Order.of(blocks, heads, max(1, splits), resident // SHARED)


def _resident(vectors: Tensor, tile: Tile) -> int:
    """Programs that run at a time, at the least."""
    return processors(vectors.device) * max(1, 8 // tile.num_warps)


def _heads_in_cache(vectors: Tensor, length: int) -> int:
    """How many heads have their base keys and values in half of the L2 cache."""
    return cache_bytes(vectors.device) // (4 * length * vectors.shape[-1] * vectors.element_size())


def thought_gradient_launch(vectors: Tensor, rows: int, thought_steps: int) -> tuple[Tile, int]:
    """Tile of the gradient of thought keys, no larger than it needs, and how many anchors share one.

    A tile has one anchor, or as many as it takes for 16 rows or 16 keys, the least that matrix units multiply. Warps
    read all of its rows, but only their own 16 keys: more warps than registers ask for read more, and gain nothing.

    Args:
        vectors: see ``forward_launch``.
        rows: S·G, query rows of an anchor.
        thought_steps: T.
    """
    head, half = padded_head(vectors.shape[-1]), vectors.element_size() == 2
    most_rows, most_keys = (64 if head <= 128 else 32, 32) if half else (16, 16)
    if half and rows < min(16, thought_steps):
        # A tile of 16 rows. Of 64 keys it fits Hopper's registers up to D = 128, those of others up to 64.
        most_keys = 64 if head <= (128 if row_key(KEY_GRADIENT, vectors)[1] == HOPPER else 64) else 32
    together = max(1, min(max(16 // rows, 16 // thought_steps), most_keys // thought_steps))
    block_n = max(16, min(most_keys, power_of_2(together * thought_steps)))
    block_m = max(16, min(most_rows, power_of_2(together * rows)))
    num_warps = 4 if head <= (128 if half else 64) else 8
    if half and head <= 64 and block_n == 16:
        num_warps = 2
    return Tile(block_m, block_n, num_warps, num_stages=2), together


class Diagonal(NamedTuple):
    """How a tile is divided for its thought keys: see ``triton_tiles``."""

    rows: int
    """Of each part."""
    anchors: int
    """The most anchors that the rows of a part belong to."""
    keys: int
    """Thought keys that a part takes in one step."""

    def sizes(self) -> dict[str, int]:
        """As kernels name them."""
        return {"DIAGONAL_M": self.rows, "DIAGONAL_N": self.keys, "DIAGONAL_ANCHORS": self.anchors}


def diagonal(rows: int, thought_steps: int, tile: Tile) -> Diagonal:
    """The cheapest division of a tile, with ``rows`` = S·G to an anchor.

    Either none, when matrix products take the fastest path, or into parts of 16 rows, the smallest there are, in a
    batched product at about half that speed.
    """

    def parts_of(part: int, most_keys: int) -> Diagonal:
        anchors = most_anchors(rows, part)
        return Diagonal(part, anchors, max(16, min(most_keys, power_of_2(anchors * thought_steps))))

    def columns(parts: Diagonal) -> int:
        return -(-parts.anchors * thought_steps // parts.keys) * parts.keys

    whole, small = parts_of(tile.block_m, min(64, tile.block_n)), parts_of(16, 16)
    return whole if tile.block_m == 16 or columns(whole) <= 2 * columns(small) else small


def tile_anchors(rows: int, tile: Tile) -> int:
    """A power of two that is enough for the anchors of a tile's rows, with ``rows`` = S·G to an anchor."""
    return power_of_2(most_anchors(rows, tile.block_m))


def most_anchors(rows: int, part: int) -> int:
    """The most anchors that ``part`` neighbouring rows belong to, with ``rows`` = S·G to an anchor."""
    # Parts start at multiples of their size, so within an anchor at multiples of the gcd.
    return (rows - math.gcd(rows, part) + part - 1) // rows + 1


def power_of_2(least: int) -> int:
    """The smallest power of two that is not below ``least``."""
    return 1 << (least - 1).bit_length()
