"""Warp specialisation, TMA and mbarriers: kernels in Gluon, compiled and emulated, right and broken."""

import pytest

from ptx.emulated import needs_gluon, run_emulated

pytestmark = needs_gluon

FORWARD, BACKWARD = "ptx/emulated_gluon_forward.py", "ptx/emulated_gluon_backward.py"


def test_small_ones_emulated():
    run_emulated("sm_90", {FORWARD: "small or first_ones or too_many", BACKWARD: "256 or first_ones"})


@pytest.mark.slow
def test_all_emulated():
    run_emulated("sm_90", {FORWARD: "right", BACKWARD: "right"}, workers=2)


@pytest.mark.slow
def test_broken_ones_are_caught_emulated():
    run_emulated("sm_90", {FORWARD: "test_caught", BACKWARD: "test_caught"}, workers=2)
