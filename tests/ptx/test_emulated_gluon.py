"""Warp specialisation, TMA loads and mbarriers: a kernel in Gluon, compiled and emulated, right and broken."""

from importlib import metadata

import pytest

from ptx.emulated import run_emulated

pytest.importorskip("triton")
VERSION = metadata.version("triton")
pytestmark = pytest.mark.skipif(
    tuple(map(int, VERSION.split(".")[:2])) < (3, 8), reason=f"Gluon for Hopper is another in Triton {VERSION}: 3.8"
)

FILE = "ptx/emulated_gluon.py"


def test_a_small_one_emulated():
    run_emulated("sm_90", {FILE: "small or first_ones or too_many"})


@pytest.mark.slow
def test_all_emulated():
    run_emulated("sm_90", {FILE: "right"}, workers=2)


@pytest.mark.slow
def test_broken_ones_are_caught_emulated():
    run_emulated("sm_90", {FILE: "test_caught"}, workers=2)
