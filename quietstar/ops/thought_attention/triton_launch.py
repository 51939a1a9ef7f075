"""Launch parameters of the Triton kernels of thought attention.

``TILES`` is a table by kernel, architecture, element size and padded head size (see ``_launch_table``). Nothing is
tuned while a program runs: ``python -m quietstar.ops.tune`` times candidates on the current GPU and prints rows to put
here. No row has been timed yet. In half precision none spills registers, except for up to four in some with Triton 3.6,
when compiled as in ``tests/ops/test_thought_attention_compile.py``.
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
        """Options for the compiler. Fused multiply-adds are set explicitly because Triton's default will change."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


FORWARD, DECODE, QUERY_GRADIENT, KEY_GRADIENT = "forward", "decode", "query gradient", "key gradient"

# (kernel, architecture, bytes of an element, padded head size). Larger tiles read less from the L2 cache; they are
# limited by registers (with 8 warps, 255 per thread) and shared memory.
TILES: dict[tuple[str, str, int, int], Tile] = {
    # Hopper: 227 KiB of shared memory, and wgmma, which takes 64 rows per warp group. Two groups share each block of
    # keys; the running output (query gradient: dQ) of 128 rows fills half of their registers at D = 128.
    (FORWARD, HOPPER, 2, 64): Tile(128, 128, 8, 3),
    (FORWARD, HOPPER, 2, 128): Tile(128, 128, 8, 3),
    (FORWARD, HOPPER, 2, 256): Tile(64, 32, 8, 2),
    (QUERY_GRADIENT, HOPPER, 2, 64): Tile(128, 64, 8, 3),
    (QUERY_GRADIENT, HOPPER, 2, 128): Tile(128, 64, 8, 3),
    (QUERY_GRADIENT, HOPPER, 2, 256): Tile(32, 64, 8, 1),  # wgmma, from 64 rows on, would spill
    # The key gradient accumulates dK and dV, so here the keys come in blocks of 128.
    (KEY_GRADIENT, HOPPER, 2, 64): Tile(64, 128, 8, 3),
    (KEY_GRADIENT, HOPPER, 2, 128): Tile(64, 128, 8, 3),
    (KEY_GRADIENT, HOPPER, 2, 256): Tile(64, 32, 8, 2),
    # Blackwell: accumulators are in tensor memory, but Triton moves them through registers around each product.
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
    # All others (GeForce, workstation and inference cards), like Ampere with 99 KiB.
    (FORWARD, COMPACT, 2, 64): Tile(128, 32, 4, 3),
    (FORWARD, COMPACT, 2, 128): Tile(64, 64, 8, 2),
    (FORWARD, COMPACT, 2, 256): Tile(64, 32, 8, 1),
    (QUERY_GRADIENT, COMPACT, 2, 64): Tile(128, 32, 4, 2),
    (QUERY_GRADIENT, COMPACT, 2, 128): Tile(128, 32, 8, 2),
    (QUERY_GRADIENT, COMPACT, 2, 256): Tile(32, 32, 8, 1),
    (KEY_GRADIENT, COMPACT, 2, 64): Tile(64, 128, 8, 2),
    (KEY_GRADIENT, COMPACT, 2, 128): Tile(64, 64, 8, 2),
    (KEY_GRADIENT, COMPACT, 2, 256): Tile(32, 32, 4, 1),
    # Decoding is bound by memory: few rows, small programs so that several run on a multiprocessor, loads far ahead.
    (DECODE, ANY, 2, 64): Tile(64, 64, 4, 3),
    (DECODE, ANY, 2, 128): Tile(64, 64, 4, 3),
    (DECODE, ANY, 2, 256): Tile(64, 32, 4, 2),
    # float32 at full precision has no tensor cores: both operands of a product are in registers, so tiles are small,
    # and some still spill a few registers.
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

# A decoding program takes at least this many keys; with fewer, starting it and combining its result would cost more.
SPLIT_KEYS = 256
# A program of the key gradient takes at least this many rows, for the same reason.
SPLIT_ROWS = 512
# Blocks of a head that are in flight in the key gradient; see ``triton_order``. A single block of 128 keys takes 256
# FLOPs per byte of its rows; this many take far more than a GPU can do in the time of reading a byte from memory.
SHARED = 4


@functools.cache
def processors(device: torch.device) -> int:
    """Return a lower bound on the number of programs that run at the same time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Return the size of the L2 cache in bytes."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def padded_head(head_size: int) -> int:
    """Return the power of two that a head is padded to, since tiles have no other sizes."""
    return max(16, power_of_2(head_size))


def row_key(kernel: str, vectors: Tensor) -> tuple[str, str, int, int]:
    """Return a kernel's key in ``TILES`` for the device, dtype and head size of ``vectors``, the largest heads."""
    return _launch_table.row_key(kernel, vectors, vectors.element_size(), max(64, padded_head(vectors.shape[-1])))


def tile_for(kernel: str, vectors: Tensor) -> Tile:
    """Return the table's row for a kernel; ``vectors`` is as in ``row_key``."""
    kernel, family, *width = row_key(kernel, vectors)
    if family == INTERPRETER:
        return Tile(64, 32, num_warps=4, num_stages=1)
    return TILES.get((kernel, family, *width)) or TILES[kernel, ANY, *width]


def edge(block: int) -> int:
    """Return the size of masked blocks: half of the others, because on average half of a masked block is waste."""
    return max(16, block // 2)


def forward_launch(vectors: Tensor, rows: int, heads: int, length: int) -> tuple[Tile, Order]:
    """Return the forward's tile and the order of its programs; with few rows, keys are split over several programs.

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
    """Return the query gradient's tile and the order of its programs; see ``forward_launch``."""
    tile = tile_for(QUERY_GRADIENT, vectors)
    return tile, Order.of(-(-rows // tile.block_m), heads, 1, _heads_in_cache(vectors, length))


def key_gradient_launch(vectors: Tensor, rows: int, heads: int, length: int) -> tuple[Tile, Order]:
    """Return the base key gradient's tile and the order of its programs; see ``forward_launch``.

    Rows are split until there are two programs for each that can run at a time: the longest are then paired with the
    shortest, and little time is lost waiting. More splits would only add more partial gradients to sum.
    """
    tile = tile_for(KEY_GRADIENT, vectors)
    blocks, resident = -(-length // tile.block_n), _resident(vectors, tile)
    splits = min(2 * resident // (blocks * heads), -(-rows // SPLIT_ROWS))
    return tile, Order.of(blocks, heads, max(1, splits), resident // SHARED)


def _resident(vectors: Tensor, tile: Tile) -> int:
    """Return a lower bound on the number of programs of this tile that run at a time."""
    return processors(vectors.device) * max(1, 8 // tile.num_warps)


def _heads_in_cache(vectors: Tensor, length: int) -> int:
    """Return how many heads' base keys and values fit half of the L2 cache."""
    return cache_bytes(vectors.device) // (4 * length * vectors.shape[-1] * vectors.element_size())


def thought_gradient_launch(vectors: Tensor, rows: int, thought_steps: int) -> tuple[Tile, int]:
    """Return the thought key gradient's tile, no larger than needed, and how many anchors share one.

    A tile has one anchor, or as many as give 16 rows or 16 keys, the least that tensor cores multiply. Each warp reads
    all rows of the tile but only its own 16 keys, so more warps than registers require would only read more.

    Args:
        vectors: see ``forward_launch``.
        rows: S·G, query rows of an anchor.
        thought_steps: T.
    """
    head, half = padded_head(vectors.shape[-1]), vectors.element_size() == 2
    most_rows, most_keys = (64 if head <= 128 else 32, 32) if half else (16, 16)
    if half and rows < min(16, thought_steps):
        # A tile of 16 rows. With 64 keys it fits Hopper's registers up to D = 128, those of other GPUs up to 64.
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
    """Rows of each part."""
    anchors: int
    """The largest number of anchors that the rows of a part belong to."""
    keys: int
    """Thought keys that a part takes in one step."""

    def sizes(self) -> dict[str, int]:
        """The same by the names of the kernels' arguments."""
        return {"DIAGONAL_M": self.rows, "DIAGONAL_N": self.keys, "DIAGONAL_ANCHORS": self.anchors}


def diagonal(rows: int, thought_steps: int, tile: Tile) -> Diagonal:
    """Return the cheapest division of a tile, with ``rows`` = S·G per anchor.

    Either the tile is not divided, so that matrix products take the fastest path, or it is divided into parts of 16
    rows, the smallest possible, in a batched product at about half that speed.
    """

    def parts_of(part: int, most_keys: int) -> Diagonal:
        anchors = most_anchors(rows, part)
        return Diagonal(part, anchors, max(16, min(most_keys, power_of_2(anchors * thought_steps))))

    def columns(parts: Diagonal) -> int:
        return -(-parts.anchors * thought_steps // parts.keys) * parts.keys

    whole, small = parts_of(tile.block_m, min(64, tile.block_n)), parts_of(16, 16)
    return whole if tile.block_m == 16 or columns(whole) <= 2 * columns(small) else small


def tile_anchors(rows: int, tile: Tile) -> int:
    """Return a power of two that covers the anchors of a tile's rows, with ``rows`` = S·G per anchor."""
    return power_of_2(most_anchors(rows, tile.block_m))


def most_anchors(rows: int, part: int) -> int:
    """Return the largest number of anchors that ``part`` adjacent rows belong to, with ``rows`` = S·G per anchor."""
    # Parts start at multiples of their size, so their starts within an anchor are multiples of the gcd.
    return (rows - math.gcd(rows, part) + part - 1) // rows + 1


def power_of_2(least: int) -> int:
    """Return the smallest power of two that is not below ``least``."""
    return 1 << (least - 1).bit_length()
