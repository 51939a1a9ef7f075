"""In which order the programs of a launch go over its blocks: longest first, so that processors end together.

A block is a tile of rows, or of keys in the key gradient. With a causal mask blocks differ in length, from that of the
whole sequence down to next to nothing. Programs start in the order of their numbers, each as a processor gets free: if
block by block, with all heads of a block side by side, what is left for the end is short. Head by head, the long blocks
of the last heads would start late, and most processors would wait for them.

What heads of other blocks read from memory, they read through one L2 cache, so that it must hold what belongs to all
heads that are worked on at a time. This is why heads are taken in groups, one group after the other, as few at a time
as the cache needs (``together``):

- The forward and the query gradient go over the keys and values of a head, which every program of it reads: as many
  heads as have theirs in half of the cache. From the first program of a group to the last one they are read from
  memory once.
- The key gradient goes over the rows of a head, which are more than a cache holds, and reads each of them in a block's
  time. Neighbouring blocks begin at the same row (the last), take equally long, and hence are at the same rows at the
  same time. It takes as few heads as leave ``SHARED`` blocks of each in flight. Its splits take turns at tiles, instead
  of a range of rows each, in order to be at the same rows, too.
"""

from typing import NamedTuple

import triton
import triton.language as tl  # noqa: F401 (the interpreter looks for it)


class Order(NamedTuple):
    """The programs of a launch, and how they follow on one another."""

    blocks: int
    heads: int
    """B·Hkv."""
    splits: int
    """Programs that share the work of one block of one head."""
    together: int
    """Heads that are worked on side by side; divides ``heads``."""

    @classmethod
    def of(cls, blocks: int, heads: int, splits: int, most: int) -> "Order":
        """With as many heads together as divide ``heads``, ``most`` at most, but one in any case."""
        together = next((n for n in range(min(heads, most), 1, -1) if heads % n == 0), 1)
        return cls(blocks, heads, splits, together)

    @property
    def grid(self) -> tuple[int]:
        """Of the launch."""
        return (self.blocks * self.heads * self.splits,)


@triton.jit
def place_of(program, blocks, kv_heads, splits, together):
    """Block, batch, head and split of a program: the four numbers of ``Order``, of heads those of one batch.

    It is for kernels in Triton and in Gluon, and, as ``place_of.fn``, for Python's numbers.
    """
    side_by_side = together * splits
    block = program % (blocks * side_by_side) // side_by_side
    part = program // (blocks * side_by_side) * side_by_side + program % side_by_side
    head = part // splits
    return block, head // kv_heads, head % kv_heads, part % splits
