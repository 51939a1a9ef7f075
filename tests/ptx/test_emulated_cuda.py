"""The CUDA kernels as nvcc compiles them, emulated."""

import pytest

from ptx.emulated import every_target, run_emulated

pytestmark = pytest.mark.slow

FILES = "ops/test_native_cuda.py", "ops/test_native_cuda_attention.py"
# For sm_100 nvcc makes nearly what it makes for sm_90: there, the models' precision.
SELECTED = {"sm_100": "bfloat16"}


@every_target
def test_all_emulated(target):
    run_emulated(target, dict.fromkeys(FILES, SELECTED.get(target, "")), workers=2)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_broken_kernels_are_caught_emulated(target):
    run_emulated(target, {"ptx/broken_cuda.py": ""})
