"""Five matrix products or seven in the backward of thought attention on Hopper, by a model: nothing of it was measured.

    python benchmarks/hopper_products.py

Seven: a kernel for dQ (S, dP, dQ) and one for dK and dV (S, dP, dV, dK), each with its sums in registers. Five: one
kernel that keeps a block of keys and adds up dQ of the rows in memory, in float32. For the sum to be the same bits each
time, block n adds to a tile of rows behind block n - 1. The rest of a call (gradients of thought keys, tables of rows)
is the same in both, but five need a kernel of its own for what is first in dQ, that of thought keys, and one at the end
that rounds dQ.

In favour of five it is assumed that the loop keeps the matrix units as busy as that of seven, although dS goes to
shared memory and both warp groups wait for each other's there; that nobody ever waits for a turn; and that registers
suffice (the sketch in tests/ptx/gluon_backward.py spills 168 bytes with 240 registers a thread).
"""

from typing import NamedTuple

PROCESSORS, CLOCK, FLOP = 132, 1.755e9, 4096  # of an H100; FLOP per cycle of a multiprocessor
SUSTAINED = 790e12  # what large products of random numbers reach at the power limit
L2_BYTES = 48  # per cycle of a multiprocessor
MEMORY = 0.9 * 3.35e12  # bytes a second of an H100; an H200 has 4.8e12
CACHE = 25e6  # half of the L2 cache
HEADS, HEAD, ROWS, KEYS = 32, 128, 64, 128  # rows and keys of a step
OUTSIDE = 3000  # cycles of a program of the dQ kernel, 128 rows, without products: vectors come in, dQ goes out
STEPS = 1, 4, 14
LENGTHS = 512, 1024, 2048, 4096, 8192


class Times(NamedTuple):
    """Seconds of a call; ``in_step`` blocks of keys of a head are at the same rows at the same time."""

    seven: float
    five: float
    products: float
    """Of ``five``, its loop."""
    passes: float
    """Of ``five``, the kernels in front and behind."""


def times(length: int, steps: int, in_step: int) -> Times:
    """With an anchor at each of ``length`` positions."""
    rows = HEADS * length * steps
    product = 2 * HEAD * rows * (length + 1) / 2
    seven = 7 * product / SUSTAINED + rows / 128 * OUTSIDE / (PROCESSORS * CLOCK)

    tile = 2 * HEAD * ROWS  # bytes of query or dO in half precision
    in_units = 5 * 2 * ROWS * KEYS * HEAD / (SUSTAINED / PROCESSORS)
    from_cache = (2 * tile + 2 * 2 * tile) / (L2_BYTES * CLOCK)  # query, dO; dQ in float32 is read and written there
    from_memory = (2 * tile + 2 * 2 * tile) / in_step / (MEMORY / PROCESSORS)  # once for all that are in step
    if 4 * HEAD * rows <= CACHE:
        from_memory = 0
    step = max(in_units, from_cache, from_memory)
    products = product / (2 * ROWS * KEYS * HEAD) * step / PROCESSORS
    in_front, behind = 3, 1  # vectors of a row in half precision: query, dO, output in; dQ out
    if 4 * HEAD * rows > CACHE:  # else what is between them stays there
        in_front, behind = in_front + 2, behind + 2
    passes = 2 * HEAD * rows * (in_front + behind) / MEMORY
    return Times(seven, products + passes, products, passes)


def main() -> None:
    """Print the table."""
    print("| S | L | seven, ms | five, ms | its products | its passes | dQ in float32, GB | gain | 2 blocks in step |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for steps in STEPS:
        for length in LENGTHS:
            few, many = (times(length, steps, in_step) for in_step in (2, 4))
            milliseconds = " | ".join(f"{1e3 * seconds:.3f}" for seconds in many)
            size = 4 * HEADS * length * steps * HEAD / 1e9
            gains = " | ".join(f"{each.seven / each.five:.2f}x" for each in (many, few))
            print(f"| {steps} | {length} | {milliseconds} | {size:.2f} | {gains} |")


if __name__ == "__main__":
    main()
