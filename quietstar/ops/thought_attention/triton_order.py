"""The order in which a launch's programs process blocks: longest first, so that multiprocessors finish together.

A block is a tile of rows or, in the key gradient, of keys. With a causal mask, blocks differ in length, from that of
the whole sequence down to almost nothing. Programs start in the order of their numbers whenever a multiprocessor is
free. If they go block by block, with all heads of a block side by side, those left for the end are short. Head by head,
the long blocks of the last heads would start late, and most multiprocessors would wait for them.

All heads read memory through one L2 cache, which should hold the data of all heads that are processed at a time. So
heads are processed in groups, one group after the other, of a size (``together``) that suits the cache:

- In the forward and the query gradient, every program of a head reads the head's keys and values. A group has as many
  heads as have these in half of the cache, so that they are read from memory once for the whole group.
- In the key gradient, a program reads the rows of a head, which are more than a cache holds. Neighbouring blocks begin
  at the same row (the last) and take equally long, so they read the same rows at the same time. A group has so few
  heads that ``SHARED`` blocks of each are in flight. Its splits take turns at tiles, instead of one range of rows each,
  so that they read the same rows at the same time, too.
"""

from typing import NamedTuple

import triton
import triton.language as tl  # noqa: F401 (the interpreter needs it)


class Order(NamedTuple):
    """The number of programs of a launch, and their order."""

    blocks: int
    heads: int
    """B·Hkv."""
    splits: int
    """Number of programs that share the work of one block of one head."""
    together: int
    """Number of heads that are processed side by side; divides ``heads``."""

    @classmethod
    def of(cls, blocks: int, heads: int, splits: int, most: int) -> "Order":
        """Create the order whose ``together`` is the largest divisor of ``heads`` up to ``most``, at least one."""
        together = next((n for n in range(min(heads, most), 1, -1) if heads % n == 0), 1)
        return cls(blocks, heads, splits, together)

    @property
    def grid(self) -> tuple[int]:
        """The grid of the launch."""
        return (self.blocks * self.heads * self.splits,)


@triton.jit
def place_of(program, blocks, kv_heads, splits, together):
    """Return block, batch, head and split of a program, given numbers of ``Order`` (``kv_heads`` is per batch).

    For kernels in Triton and in Gluon and, as ``place_of.fn``, for Python numbers.
    """
    side_by_side = together * splits
    block = program % (blocks * side_by_side) // side_by_side
    part = program // (blocks * side_by_side) * side_by_side + program % side_by_side
    head = part // splits
    return block, head // kv_heads, head % kv_heads, part % splits
