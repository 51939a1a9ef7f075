"""The Triton kernels of thought attention, compiled and emulated."""

import pytest

from ptx.emulated import every_target, kernels_of, run_emulated

pytest.importorskip("triton")

FILE = "ops/test_thought_attention_triton.py"
# Loops over blocks with loads in flight in the models' precision, and the smallest of everything else.
QUICK = {
    "sm_80": "over_tiles and bfloat16 and ((64 and all and positions) or decoding)",
    "sm_90": "(over_tiles and bfloat16 and ((64 and blocks and keys) or decoding)) or "
    "(values_and_gradients and 192 and bfloat16)",  # gradients in Gluon are for heads of at most 128
    "sm_100": "over_tiles and bfloat16 and ((64 and blocks and keys) or decoding)",
}
# On sm_90 everything, the cases in the models' precision; on sm_80 those in the other dtypes, a third in each; on both
# others what has loops over blocks, or is split. (A kernel takes a second to compile, and a case has four kernels.)
ALL = {
    "sm_80": "split or over_tiles or (values_and_gradients and (blocks or not bfloat16))",
    "sm_90": "bfloat16 or over_tiles or not values_and_gradients",
    "sm_100": "split or over_tiles or (values_and_gradients and blocks and bfloat16)",
}


@every_target
def test_quick_ones_emulated(target):
    launched = run_emulated(target, {FILE: QUICK[target]})
    assert kernels_of("thought_attention") - launched == set()


@pytest.mark.slow
@every_target
def test_all_emulated(target):
    run_emulated(target, {FILE: ALL[target]}, workers=2)


@pytest.mark.slow
@every_target
def test_broken_kernels_are_caught_emulated(target):
    run_emulated(target, {"ptx/broken_triton.py": ""})
