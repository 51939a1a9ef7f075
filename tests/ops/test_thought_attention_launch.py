"""Launch parameters of the Triton kernels of thought attention: the table is whole, and what is tuned fits."""

import itertools

import pytest
import torch
from compile_kernels import SHARED_MEMORY
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from quietstar.ops import _launch_table
from quietstar.ops.thought_attention import gluon_launch, triton_tune
from quietstar.ops.thought_attention import triton_launch as launch
from quietstar.ops.thought_attention.triton_launch import FORWARD, HOPPER, TILES, Tile

FAMILIES = {launch.HOPPER: 90, launch.BLACKWELL: 100, launch.AMPERE: 80, launch.COMPACT: 86}
DTYPES = torch.bfloat16, torch.float32


@pytest.fixture
def family(request, monkeypatch):
    """The kernels are launched as on this architecture, wherever they run."""
    family = getattr(request, "param", HOPPER)
    monkeypatch.setattr(_launch_table, "architecture", lambda: family)
    return family


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_every_architecture_has_rows_for_everything(family):
    for kernel, dtype, head in itertools.product(triton_tune.KERNELS, DTYPES, (8, 16, 64, 80, 96, 128, 200, 256)):
        query = torch.empty(1, 1, 1, 1, head, dtype=dtype)
        assert launch.tile_for(kernel, query) in triton_tune.candidates(kernel, query, 227 << 10)


def test_the_architecture_is_that_of_the_tensor(monkeypatch):
    """Stands in for a machine with GPUs of two kinds; Triton speaks of the one that is current."""
    current = [0]

    def set_current(index):
        current[0], previous = index, current[0]
        return previous

    monkeypatch.setattr(torch.cuda, "_exchange_device", set_current)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", set_current)
    monkeypatch.setattr(_launch_table, "architecture", lambda: (launch.AMPERE, HOPPER)[current[0]])
    for device, family in enumerate((launch.AMPERE, HOPPER)):
        with FakeTensorMode():
            query = torch.empty(1, 1, 1, 1, 128, dtype=torch.bfloat16, device=f"cuda:{device}")
        assert launch.tile_for(FORWARD, query) == TILES[FORWARD, family, 2, 128]
        assert current == [0]


@pytest.mark.parametrize("block_m", [16, 32, 128])
@pytest.mark.parametrize("thought_steps", [1, 14, 130])
@pytest.mark.parametrize("rows", [1, 4, 7, 48, 56, 300])
def test_parts_of_a_tile_have_room_for_their_anchors_and_no_more(rows, thought_steps, block_m):
    part = launch.diagonal(rows, thought_steps, Tile(block_m, 64, 8, 2))
    starts = range(0, part.rows * rows, part.rows)
    assert part.anchors == max((start + part.rows - 1) // rows - start // rows + 1 for start in starts)
    assert part.rows in (16, block_m)
    assert part.keys & (part.keys - 1) == 0


@pytest.mark.parametrize(
    ("rows", "length", "splits"),
    [(4, 16384, 33), (4, 600, 3), (4, 256, 1), (56, 16384, 33), (4096, 16384, 1)],
    ids=["long cache", "short cache", "no more than one split's keys", "a thought", "training"],
)
def test_keys_are_split_until_the_device_is_full(rows, length, splits, family, monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    query = torch.empty(1, 1, 1, 1, 128, dtype=torch.bfloat16)
    assert launch.forward_launch(query, rows, heads=8, length=length)[1].splits == splits


@pytest.mark.parametrize("shared_memory", [99 << 10, SHARED_MEMORY[90]])
def test_candidates_depend_on_the_device(shared_memory):
    query = torch.empty(1, 1, 1, 1, 256, dtype=torch.bfloat16)
    tiles = triton_tune.candidates(FORWARD, query, shared_memory)
    assert (Tile(128, 64, 8, 2) in tiles) == (shared_memory >= (128 + 2 * 2 * 64) * 256 * 2)
    assert Tile(128, 32, 4, 1) not in tiles  # the output alone would take all registers


@pytest.mark.parametrize("head", [64, 128, 256])
def test_rows_of_gluon_are_candidates(head):
    query = torch.empty(1, 1, 1, 1, head, dtype=torch.bfloat16)
    assert gluon_launch.TILES[head] in triton_tune.gluon_candidates(query, SHARED_MEMORY[90])


@pytest.mark.parametrize(("stages", "fit"), [(3, True), (4, False)])
def test_stages_cost_shared_memory(stages, fit):
    """Three of 128 keys and values take 229,376 of Hopper's 232,448 bytes."""
    query = torch.empty(1, 1, 1, 1, 128, dtype=torch.bfloat16)
    assert (Tile(128, 128, 8, stages) in triton_tune.candidates(FORWARD, query, SHARED_MEMORY[90])) == fit
