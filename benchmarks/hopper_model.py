"""How fast thought attention should be on a Hopper GPU, by a model: nothing of this was measured.

    python benchmarks/hopper_model.py                       the table, for L = 512 ... 8192 and S = 1, 4, 14
    python benchmarks/hopper_model.py --steps 14 --lengths 2048

It needs no GPU: kernels are compiled for sm_90 as a call would launch them, their loops are read from the machine code
and timed by the model in ``hopper_loops``, which says where its rates are from. "Before" are the kernels in Triton with
the launch parameters and the order of programs of 2026-11-26, "after" what this checkout launches with the Triton that
is installed.

Of a program it counts blocks of keys, or of rows, whole ones and masked ones; those of thoughts; all instructions
outside of loops, once; memory read before the loops and written behind them, when nothing else runs. Of a launch it
takes the programs in their order, each for the multiprocessor that is free first, one at a time on each.

Assumed: 132 multiprocessors at 1.755 GHz (the H100's and H200's boost clock under load); everything streamed comes from
the L2 cache in time but for its rate; products as a whole get no faster than 790 TFLOP/s, which is what large ones of
random numbers reach at the GPU's power limit; 32 query heads, 8 key heads, D = 128, bfloat16, one text, an anchor at
each position. The gradient of thought keys is a kernel of its own, which is not counted.
"""

import argparse
import contextlib
import heapq
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from hopper_loops import FLOP, L2_BYTES, Loop, iteration_cycles, loops

ROOT = Path(__file__).parent.parent
PROCESSORS, CLOCK = 132, 1.755e9
SUSTAINED = 790e12 / (FLOP * PROCESSORS * CLOCK)
MEMORY_LATENCY = 800  # cycles; once before the loops, once behind them
HEADS, KV_HEADS, HEAD = 32, 8, 128
GROUP = HEADS // KV_HEADS
TILE = 128  # rows, or keys, that a program keeps; two warp groups share them
STREAMED = 2 * HEAD * 2  # bytes: key and value of a key, query and dO of a row
LENGTHS = 512, 1024, 2048, 4096, 8192
THOUGHTS = {1: 12, 4: 4, 14: 14}  # T by S
BEGIN, END = "<!-- results -->", "<!-- /results -->"  # what the table stands between in docs/kernel_notes.md


def before(steps: int, thought_steps: int) -> None:
    """Launch the kernels in Triton as they were."""
    from quietstar.ops.thought_attention import triton_launch as launch

    with contextlib.suppress(ImportError):
        from quietstar.ops.thought_attention import gluon_launch

        for name in vars(gluon_launch):
            if name.endswith("unavailable"):
                setattr(gluon_launch, name, lambda *arguments: "is asked for in Triton")
    tiles = {
        launch.FORWARD: (128, 128, 8, 2),
        launch.QUERY_GRADIENT: (128, 64, 8, 2),
        launch.KEY_GRADIENT: (64, 128, 8, 3),
    }
    for kernel, tile in tiles.items():
        launch.TILES[kernel, launch.HOPPER, 2, HEAD] = launch.Tile(*tile)
    after(steps, thought_steps)


def after(steps: int, thought_steps: int) -> None:
    """Launch the kernels that this checkout would launch."""
    import torch

    from quietstar.ops.thought_attention import backend_triton
    from quietstar.ops.thought_attention.inputs import Inputs, Mask, ResultGradients

    def tensor(heads: int, tokens: int) -> torch.Tensor:
        return torch.empty(1, tokens, heads, HEAD, dtype=torch.bfloat16, device="meta").transpose(1, 2)

    length = 2048
    query = tensor(HEADS, length * steps).unflatten(2, (length, steps))
    base, own = tensor(KV_HEADS, length), tensor(KV_HEADS, length * thought_steps).unflatten(2, (length, thought_steps))
    inputs = Inputs(query, base, base, own, own)
    result = backend_triton.forward(inputs, Mask.of(inputs))
    backend_triton.backward(ResultGradients(result.output, None), inputs, Mask.of(inputs), result)


class Kernel(NamedTuple):
    """One of the kernels of a call."""

    names: tuple[str, ...]
    """In Triton and, if there is one, in Gluon."""
    products: int
    """Of each pair of row and key."""
    keeps_keys: bool = False
    """Whether programs keep a block of keys and go through rows, not the other way round."""


FORWARD = Kernel(("forward_kernel", "gluon_forward_kernel"), products=2)
QUERY_GRADIENT = Kernel(("query_gradient_kernel", "gluon_query_gradient_kernel"), products=3)
KEY_GRADIENT = Kernel(("key_gradient_kernel", "gluon_key_gradient_kernel"), products=4, keeps_keys=True)


class Cost(NamedTuple):
    """Of a compiled kernel, in cycles of a multiprocessor."""

    name: str
    block: float
    """Of a block that everything of is seen."""
    columns: int
    """Keys, or rows, of such a block."""
    edge: float
    """Of a masked block."""
    edge_columns: int
    thoughts: float
    """Of an iteration of the loop over thought keys, if there is one."""
    thought_columns: int
    """Keys of such an iteration."""
    outside: float
    """Of everything else."""
    under: int
    """Groups of products that run under the exponentials of a whole block."""
    bound: float
    """What ``block`` could be at the least: the longest of its units."""


def cost_of(kernel: Kernel, name: str, sass: str) -> Cost:
    """From machine code: its innermost loops are those over whole blocks, masked blocks and thought keys."""
    found = loops(sass)
    flop = max(loop.flop for loop in found)
    whole = min((loop for loop in found if loop.flop == flop), key=lambda loop: loop.size)
    own = next((loop for loop in found if loop.divides or not loop.flop), None)
    masked = [loop for loop in found if loop not in (whole, own) and loop.flop and not loop.divides]
    edge = masked[0] if masked else whole
    # Each warp group may have code of its own, alike but for a few instructions.
    copies = sum(loop.flop == flop and loop.size < 1.05 * whole.size for loop in found)
    outside = sass.count(" ;") - sum(loop.size for loop in found)

    def columns(loop: Loop) -> int:
        return round(2 * loop.flop / (kernel.products * 2 * TILE * HEAD))

    return Cost(
        name=name,
        block=limited(whole, columns(whole)),
        columns=columns(whole),
        edge=limited(edge, columns(edge)),
        edge_columns=columns(edge),
        thoughts=limited(own, columns(own)) if own else 0.0,
        thought_columns=(columns(own) or 16) if own else 0,
        outside=2 * outside / copies + 2 * MEMORY_LATENCY,
        under=whole.products_under_exponentials(),
        bound=max(2 * whole.flop / FLOP, 2 * 8 * whole.exponentials, 2 * whole.size),
    )


def limited(loop: Loop, columns: int) -> float:
    """Cycles of an iteration, as the model has it, and not less than power and the L2 cache allow."""
    return max(iteration_cycles(loop), 2 * loop.flop / (FLOP * SUSTAINED), STREAMED * columns / L2_BYTES)


def programs(kernel: Kernel, cost: Cost, length: int, steps: int, thought_steps: int) -> list[float]:
    """Cycles of the programs of one key head, in the order of their blocks."""
    anchor_rows = steps * GROUP

    def of_keys(first: int) -> float:
        partly = min(TILE, length - first) * anchor_rows
        wholly = length * anchor_rows - first * anchor_rows - partly
        return cost.outside + wholly / cost.columns * cost.block + partly / cost.edge_columns * cost.edge

    def of_rows(first: int) -> float:
        low, high = first // anchor_rows, min(first + TILE - 1, length * anchor_rows - 1) // anchor_rows
        blocks = (low + 1) // cost.columns
        edges = -(-(high + 1 - blocks * cost.columns) // cost.edge_columns)
        own = 0
        if cost.thought_columns:
            keys = (high - low + 1) * thought_steps
            # A product of parts of 16 rows takes the keys of each part's anchors at the same time.
            own = -(-keys // (cost.thought_columns * (TILE // 16 if cost.thought_columns == 16 else 1)))
        return cost.outside + blocks * cost.block + edges * cost.edge + own * cost.thoughts

    if kernel.keeps_keys:
        return [of_keys(first) for first in range(0, length, TILE)]
    return [of_rows(first) for first in range(0, length * anchor_rows, TILE)][::-1]


def makespan(costs: Iterable[float], processors: int = PROCESSORS) -> float:
    """When the last of the programs has ended, each given to the processor that is free first."""
    free = [0.0] * processors
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def seconds(kernel: Kernel, cost: Cost, length: int, steps: int, thought_steps: int, heads_first: bool) -> float:
    """Of a launch; the programs of a head one after the other, or the longest of all heads first.

    Rows of a block of keys are split over several programs, if those are less than one (two) for each processor.
    """
    of_head = programs(kernel, cost, length, steps, thought_steps)
    if kernel.keeps_keys:
        blocks, most = KV_HEADS * len(of_head), -(-length * steps * GROUP // 1024)
        splits = max(1, min((1 if heads_first else 2) * PROCESSORS // blocks, most))
        of_head = [(each - cost.outside) / splits + cost.outside for each in of_head for _ in range(splits)]
    order = of_head * KV_HEADS if heads_first else [each for each in of_head for _ in range(KV_HEADS)]
    return makespan(order) / CLOCK


def pairs(length: int, steps: int, thought_steps: int) -> int:
    """Visible pairs of query and key."""
    own = steps * (steps + 1) // 2 + steps * (thought_steps - steps)
    return HEADS * (steps * length * (length + 1) // 2 + length * own)


@cache
def compiled_costs(function: str, steps: int, thought_steps: int) -> dict[Kernel, Cost]:
    """What ``before`` or ``after`` compile to; takes a minute."""
    sys.path.append(str(ROOT / "tests"))
    from compile_kernels import compiled
    from ptx.sass_registers import assembled

    found = {}
    for each in compiled(__file__, f"{function}:{steps}:{thought_steps}", (90,))[90]:
        for kernel in (FORWARD, QUERY_GRADIENT, KEY_GRADIENT):
            if each.name in kernel.names:
                found[kernel] = cost_of(kernel, each.name, assembled(each.ptx, 90))
    return found


def teraflops(
    costs: dict[Kernel, Cost], length: int, steps: int, thought_steps: int, heads_first: bool
) -> Iterator[float]:
    """Of the forward and of the backward."""
    work = 4 * HEAD * pairs(length, steps, thought_steps)
    for kernels, flops in (((FORWARD,), work), ((QUERY_GRADIENT, KEY_GRADIENT), 2.5 * work)):
        time = sum(seconds(k, costs[k], length, steps, thought_steps, heads_first) for k in kernels)
        yield flops / time / 1e12


def tables(
    lengths: Sequence[int],
    thoughts: dict[int, int],
    costs: Callable[[str, int, int], dict[Kernel, Cost]] = compiled_costs,
) -> Iterator[str]:
    """Lines of Markdown: cycles of blocks, and TFLOP/s."""
    yield "| S | kernel | | block | cycles | longest unit | products under exponentials | masked block | outside |"
    yield "|---:|---|---|---:|---:|---:|---:|---:|---:|"
    for steps, thought_steps in thoughts.items():
        for when in ("before", "after"):
            for cost in costs(when, steps, thought_steps).values():
                cells = f"{cost.block:.0f} | {cost.bound:.0f} | {cost.under} | {cost.edge:.0f} | {cost.outside:.0f}"
                yield f"| {steps} | `{cost.name}` | {when} | {TILE} x {cost.columns} | {cells} |"
    yield ""
    yield "| S | T | L | forward before | after | | backward before | after | |"
    yield "|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for steps, thought_steps in thoughts.items():
        for length in lengths:
            old, new = (
                tuple(teraflops(costs(when, steps, thought_steps), length, steps, thought_steps, when == "before"))
                for when in ("before", "after")
            )
            cells = (f"{a:.0f} | {b:.0f} | {b / a:.2f}x" for a, b in zip(old, new, strict=True))
            yield f"| {steps} | {thought_steps} | {length} | {' | '.join(cells)} |"


def into_notes(path: Path, text: str) -> None:
    """Replace what stands between the markers."""
    notes = path.read_text("utf-8")
    if notes.count(BEGIN) != 1 or notes.count(END) != 1 or notes.index(END) < notes.index(BEGIN):
        raise ValueError(f"{path}: {BEGIN} and, behind it, {END} expected, once each")
    before, _, rest = notes.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="hopper_model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="L (default: all)")
    parser.add_argument(
        "--steps", type=int, nargs="+", choices=THOUGHTS, default=list(THOUGHTS), help="S (default: all)"
    )
    parser.add_argument("--notes", type=Path, help=f"replace what stands between {BEGIN} and {END} in this file")
    options = parser.parse_args(arguments)
    if min(options.lengths) < TILE:
        parser.error(f"--lengths must be at least {TILE}, got {min(options.lengths)}")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        parser.error(f"needs Triton: {error}")
    text = "\n".join(tables(options.lengths, {steps: THOUGHTS[steps] for steps in options.steps}))
    if options.notes is None:
        print(text)
        return 0
    try:
        into_notes(options.notes, text)
    except (ValueError, OSError) as error:
        parser.error(f"--notes: {error}")
    return 0


if __name__ == "__main__":
    sys.path.append(str(ROOT))  # where quietstar is not installed
    sys.exit(main())
