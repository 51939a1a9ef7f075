"""The model of a Hopper GPU: it reads machine code right, and its limits are what they have to be."""

import hopper_loops
import hopper_model
import pytest
import torch
from hopper_loops import FLOP, PRODUCT_LATENCY, iteration_cycles, loop_of, loops, work
from hopper_model import FORWARD, KEY_GRADIENT, PROCESSORS, QUERY_GRADIENT, Cost, makespan

from quietstar.ops.thought_attention.cost import thought_attention_cost

PRODUCT = ["WARPGROUP.ARRIVE", *["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24"] * 7]
PRODUCT = [*PRODUCT, "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"]
ONE_PRODUCT = 8 * 2 * 64 * 128 * 16 / FLOP
EXPONENTIALS = ["MUFU.EX2 R1, R1"] * 64
DONE, ONE_LEFT = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
SERIAL = [*PRODUCT, DONE, *EXPONENTIALS]
TOGETHER = [*PRODUCT, *EXPONENTIALS, DONE]


@pytest.mark.parametrize("exponentials", [8, 64, 200])
def test_serial_is_the_sum_and_together_the_longest(exponentials):
    own = ["MUFU.EX2 R1, R1"] * exponentials
    # What a product leaves, its arrival, is issued in front of it.
    serial = iteration_cycles(loop_of([*PRODUCT, DONE, *own]), groups=1)
    assert serial == pytest.approx(ONE_PRODUCT + PRODUCT_LATENCY + 8 * exponentials, abs=2)
    together = iteration_cycles(loop_of([*PRODUCT, *own, DONE]), groups=1)
    assert together == pytest.approx(max(ONE_PRODUCT + PRODUCT_LATENCY, 8 * exponentials), abs=2)


def test_a_wait_that_leaves_a_product_is_for_the_one_before():
    loop = loop_of([*PRODUCT, *PRODUCT, ONE_LEFT, *EXPONENTIALS, *EXPONENTIALS, DONE])
    assert iteration_cycles(loop, groups=1) == pytest.approx(ONE_PRODUCT + PRODUCT_LATENCY + 2 * 8 * 64, abs=2)


def test_two_groups_share_the_schedulers():
    loop = loop_of([*EXPONENTIALS, "BAR.SYNC.DEFER_BLOCKING 0x0"])
    assert iteration_cycles(loop) == pytest.approx(2 * 8 * 64, abs=hopper_loops.BARRIER_LATENCY)


def test_two_groups_take_turns_unless_a_barrier_stops_them():
    longest, total = 2 * ONE_PRODUCT, 2 * (ONE_PRODUCT + 8 * 64)
    assert longest <= iteration_cycles(loop_of(SERIAL)) < 0.8 * total
    in_step = iteration_cycles(loop_of([*SERIAL, "BAR.SYNC.DEFER_BLOCKING 0x0"]))
    assert total <= in_step + ONE_PRODUCT  # the second product runs under the exponentials of the first group
    assert in_step > iteration_cycles(loop_of(SERIAL))
    alone = iteration_cycles(loop_of([*SERIAL, "BAR.SYNC.DEFER_BLOCKING 0x3, 0x80"]))  # of a group only
    assert alone < in_step


def test_products_one_by_one_cost_their_latency_each():
    one_by_one = [line for product in PRODUCT[1:] for line in (product.replace(", gsb0", "") + ", gsb0", DONE)]
    slow, fast = (iteration_cycles(loop_of([*code, DONE, *EXPONENTIALS]), groups=1) for code in (one_by_one, PRODUCT))
    assert slow - fast == pytest.approx(7 * PRODUCT_LATENCY, abs=2)


def test_copies_that_are_waited_for_at_once_cost_their_time():
    copy = [*["LDGSTS.E.BYPASS.128 [R1], [R2]"] * 4, "LDGDEPBAR"]
    at_once, ahead = (
        iteration_cycles(loop_of([*copy, f"DEPBAR.LE SB0, {running}", *EXPONENTIALS]), groups=1)
        for running in ("0x0", "0x1")
    )
    assert ahead == pytest.approx(8 * 64, abs=5)
    assert at_once - ahead == pytest.approx(hopper_loops.L2_LATENCY + 4 * 128 * 16 / hopper_loops.L2_BYTES, abs=5)


@pytest.mark.parametrize(
    ("code", "groups"),
    [
        (SERIAL, 0),
        (TOGETHER, 1),
        ([*PRODUCT, *PRODUCT, ONE_LEFT, *EXPONENTIALS, DONE], 1),
        ([*PRODUCT, *PRODUCT, *EXPONENTIALS, DONE], 2),
        ([*EXPONENTIALS, *PRODUCT, *EXPONENTIALS, DONE], 0),  # of the first ones nothing
    ],
)
def test_products_under_the_exponentials(code, groups):
    assert loop_of(code).products_under_exponentials() == groups


def test_work_is_that_of_the_busiest_unit():
    assert work(["FADD R1, R1, R1"] * 40) == 40
    assert work(["FADD R1, R1, R1"] * 40 + ["MUFU.EX2 R1, R1"] * 10) == 80
    assert work(["FMNMX R1, R1, R1"] * 40 + ["UIADD3 UR1, UR1, UR1"] * 10) == 80
    assert work(["UIADD3 UR1, UR1, UR1"] * 90 + ["ISETP.GE P0, PT, R1, R1"] * 10) == 100


def as_text(code, first=0):
    return "".join(f"        /*{16 * i:04x}*/                   {line} ;\n" for i, line in enumerate(code, first))


def test_innermost_loops_are_found():
    """Not those around them, nor the turns of a wait, which have no products, nor what ends the kernel."""
    inner = as_text(["@!P1 BRA `(.L_x_9)"]) + ".L_x_2:\n" + as_text([*SERIAL, "LDL R3, [R1]", "@P0 BRA `(.L_x_1)"])
    sass = f".L_x_0:\n{as_text(EXPONENTIALS)}.L_x_1:\n{inner}{as_text(['@P2 BRA `(.L_x_0)', 'EXIT'])}"
    sass += (
        f".L_x_9:\n{as_text(['SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR7], R24', '@!P1 BRA `(.L_x_9)', 'BRA `(.L_x_2)'])}"
    )
    [loop] = loops(sass)
    assert loop.flop == ONE_PRODUCT * FLOP
    assert (loop.products, loop.exponentials, loop.spills) == (8, 64, 1)


@pytest.mark.parametrize(("steps", "thought_steps"), [(1, 12), (4, 4), (3, 5)])
def test_pairs_are_those_of_the_cost(steps, thought_steps, monkeypatch):
    monkeypatch.setattr(hopper_model, "HEADS", 2)
    length, size = 40, 8
    base, own = torch.empty(1, 1, length, size), torch.empty(1, 1, length, thought_steps, size)
    flops = thought_attention_cost(torch.empty(1, 2, length, steps, size), base, base, own, own).forward.flops
    assert 4 * size * hopper_model.pairs(length, steps, thought_steps) == flops


@pytest.mark.parametrize(
    ("costs", "time"),
    [([5.0], 5), ([1.0] * PROCESSORS, 1), ([1.0] * (PROCESSORS + 1), 2), ([2.0] * PROCESSORS + [1.0] * PROCESSORS, 3)],
)
def test_programs_are_given_to_who_is_free(costs, time):
    assert makespan(costs) == time


COST = Cost("kernel", 2048, 128, 1024, 64, 512, 64, outside=4000, under=1, bound=2048)
COSTS = dict.fromkeys((FORWARD, QUERY_GRADIENT, KEY_GRADIENT), COST)


@pytest.mark.parametrize("kernel", [FORWARD, QUERY_GRADIENT, KEY_GRADIENT])
@pytest.mark.parametrize("steps", [1, 14])
def test_programs_see_all_pairs_and_little_more(kernel, steps):
    """With a cycle for each column, masked ones too, and nothing besides."""
    cost = COST._replace(block=128, edge=64, thoughts=0, outside=0)
    total = sum(hopper_model.programs(kernel, cost, 2048, steps, 12))
    pairs = 2048 * 2049 / 2 * steps * hopper_model.GROUP / hopper_model.TILE
    assert pairs <= total < 1.12 * pairs


def test_longer_texts_are_faster_and_orders_matter():
    rates = [next(hopper_model.teraflops(COSTS, length, 14, 14, heads_first=False)) for length in (512, 2048, 8192)]
    assert rates == sorted(rates)
    assert rates[-1] < FLOP * PROCESSORS * hopper_model.CLOCK / 1e12
    first, last = (list(hopper_model.teraflops(COSTS, 2048, 14, 14, heads_first)) for heads_first in (True, False))
    assert last[1] > 1.2 * first[1]


def test_the_table():
    text = list(hopper_model.tables([512], {14: 14}, lambda when, *sizes: COSTS))
    assert text[2] == "| 14 | `kernel` | before | 128 x 128 | 2048 | 2048 | 1 | 1024 | 4000 |"
    assert text[-1].count("x |") == 2


def test_the_table_goes_into_the_notes(tmp_path, monkeypatch):
    notes = tmp_path / "notes.md"
    notes.write_text(f"before\n{hopper_model.BEGIN}\nold\n{hopper_model.END}\nbehind")
    monkeypatch.setattr(hopper_model, "tables", lambda *arguments: ["| a |", "| b |"])
    assert hopper_model.main(["--notes", str(notes)]) == 0
    assert notes.read_text() == f"before\n{hopper_model.BEGIN}\n| a |\n| b |\n{hopper_model.END}\nbehind"


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        hopper_model.main(["--lengths", "100"])
    assert "--lengths must be at least 128, got 100" in capsys.readouterr().err


@pytest.mark.slow
def test_what_compiles_is_understood():
    """Nothing runs under the exponentials of the kernels in Triton; where those in Gluon run, what they promise."""
    pytest.importorskip("triton")
    costs = {when: hopper_model.compiled_costs(when, 14, 14) for when in ("before", "after")}
    for kernel, cost in costs["before"].items():
        assert cost.columns == (128 if kernel == FORWARD else 64)
        assert cost.bound < cost.block < 2.5 * cost.bound
        assert cost.under == 0
    before, after = (
        list(hopper_model.teraflops(costs[when], 2048, 14, 14, when == "before")) for when in ("before", "after")
    )
    if all("gluon" in cost.name for cost in costs["after"].values()):
        assert all(cost.under >= 1 for cost in costs["after"].values())
        assert after[0] >= 1.35 * before[0]
        assert after[1] >= 1.4 * before[1]
