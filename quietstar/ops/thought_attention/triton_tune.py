"""Times candidate launch parameters on the GPU at hand and prints rows for the table in ``triton_launch``.

    python -m quietstar.ops.thought_attention.triton_tune --head-size 128 --dtype bfloat16

It takes some minutes, most of them to compile. Nothing else calls it: a training run never stops to tune.
"""

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from quietstar.ops.thought_attention import backend_triton
from quietstar.ops.thought_attention.inputs import Inputs, Mask, ResultGradients
from quietstar.ops.thought_attention.triton_launch import (
    DECODE,
    FORWARD,
    KEY_GRADIENT,
    QUERY_GRADIENT,
    TILES,
    Tile,
    padded_head,
    row_key,
    tile_for,
)

KERNELS = (FORWARD, DECODE, QUERY_GRADIENT, KEY_GRADIENT)

# Relative difference of two right results in half precision, generously; a wrong one is off by about 1.
_TOLERANCE = 0.02
_REGISTER_BYTES = 32 * 256 * 4  # of a warp


def candidates(kernel: str, query: Tensor, shared_memory: int) -> list[Tile]:
    """Tiles worth timing: their blocks fit ``shared_memory`` [bytes], their sums half of the registers."""
    vector = padded_head(query.shape[-1])
    rows, keys = (64, 128), (32, 64, 128)
    if kernel == DECODE:
        rows = (64,)  # what the launch makes 16 of where that is enough
    elif kernel == KEY_GRADIENT:
        rows = keys
    if query.element_size() == 4:
        rows = keys = (16, 32)
    elif vector == 256:
        rows = (32, 64, 128)
    tiles = itertools.starmap(Tile, itertools.product(rows, keys, (4, 8), (1, 2, 3, 4)))

    def fits(tile: Tile) -> bool:
        resident, streamed, sums = tile.block_m, 2 * tile.block_n, tile.block_m  # vectors: query; key, value; output
        if kernel == QUERY_GRADIENT:
            resident = 2 * tile.block_m  # query, dO
        elif kernel == KEY_GRADIENT:
            # key, value; query, dO; dK, dV
            resident, streamed, sums = 2 * tile.block_n, 2 * tile.block_m, 2 * tile.block_n
        blocks = (resident + tile.num_stages * streamed) * vector * query.element_size()
        return blocks <= shared_memory and 2 * sums * vector * 4 <= tile.num_warps * _REGISTER_BYTES

    return list(filter(fits, tiles))


def _median_milliseconds(call: Callable[[], object]) -> float:
    return triton.testing.do_bench(call, return_mode="median")


def tune(
    kernel: str,
    query: Tensor,
    call: Callable[[], Iterable[Tensor]],
    tiles: Iterable[Tile],
    milliseconds: Callable[[Callable[[], object]], float] = _median_milliseconds,
) -> dict[Tile, float]:
    """The time of ``call`` with each of ``tiles`` as the table's row, the present row first.

    Tiles that do not compile, ask for more than the device has, or give another result than the present row are left
    out. The table is afterwards as it was.

    Args:
        kernel: the kernel whose row is varied.
        query: of the call; sets device, dtype and head size.
        call: launches the kernel, perhaps among others, and returns what they computed.
        tiles: the candidates.
        milliseconds: measures a call.
    """
    expected = tuple(call())
    present = tile_for(kernel, query)
    times = {}
    for tile in dict.fromkeys([present, *tiles]):
        with _row(row_key(kernel, query), tile):
            try:
                if all(map(_same, call(), expected)):
                    times[tile] = milliseconds(call)
            except TritonError:
                continue
    return times


def row(key: tuple[str, str, int, int], tile: Tile) -> str:
    """The line of ``TILES`` that sets ``tile``."""
    kernel, family, size, head = key
    names = ", ".join(name.replace(" ", "_").upper() for name in (kernel, family))
    return f"    ({names}, {size}, {head}): Tile({', '.join(map(str, tile))}),"


@contextlib.contextmanager
def _row(key: tuple[str, str, int, int], tile: Tile) -> Iterator[None]:
    """``tile`` in the table for a while."""
    kept = TILES.get(key)
    TILES[key] = tile
    try:
        yield
    finally:
        del TILES[key]
        if kept is not None:
            TILES[key] = kept


def _same(actual: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by rounding only."""
    difference = (actual.double() - expected.double()).norm()
    return bool(difference <= _TOLERANCE * expected.double().norm())


def calls(
    batch: int, length: int, steps: int, heads: int, kv_heads: int, head_size: int, dtype: torch.dtype, device: str
) -> dict[str, tuple[Tensor, Callable[[], tuple[Tensor, ...]]]]:
    """For every kernel, the query of a typical call that it dominates, and the call."""
    make = partial(torch.randn, dtype=dtype, device=device)

    def inputs(anchors: int, queries: int) -> Inputs:
        base = (make(batch, kv_heads, length, head_size) for _ in range(2))
        own = (make(batch, kv_heads, anchors, steps, head_size) for _ in range(2))
        return Inputs(make(batch, heads, anchors, queries, head_size), *base, *own)

    training, decoding = inputs(length, steps), inputs(1, 1)
    anywhere = Mask.of(training)
    at_the_end = Mask.of(decoding, torch.tensor([length - 1], device=device))
    result = backend_triton.forward(training, anywhere)
    gradients = ResultGradients(torch.randn_like(result.output), None)
    backward = training.query, partial(backend_triton.backward, gradients, training, anywhere, result)
    return {
        FORWARD: (training.query, partial(backend_triton.forward, training, anywhere)),
        DECODE: (decoding.query, partial(backend_triton.forward, decoding, at_the_end)),
        QUERY_GRADIENT: backward,
        KEY_GRADIENT: backward,
    }


def main(arguments: list[str] | None = None) -> None:
    """Tune for the shapes given on the command line; print a row for each kernel."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096, help="base tokens, an anchor at each")
    parser.add_argument("--steps", type=int, default=14, help="of a thought")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    options = vars(parser.parse_args(arguments))
    if not torch.cuda.is_available():
        parser.error("needs a GPU: it times kernels")
    kernels, dtype = options.pop("kernels"), getattr(torch, options.pop("dtype"))
    properties = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    problems = calls(**options, dtype=dtype, device="cuda")
    for kernel in kernels:
        query, call = problems[kernel]
        times = tune(kernel, query, call, candidates(kernel, query, properties["max_shared_mem"]))
        best, present = min(times, key=times.get), tile_for(kernel, query)
        print(row(row_key(kernel, query), best), f" # {times[best]:.3f} ms; {times[present]:.3f} with {tuple(present)}")


if __name__ == "__main__":
    main()
