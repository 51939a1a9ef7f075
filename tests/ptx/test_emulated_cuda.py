"""The CUDA kernels as nvcc compiles them, emulated."""

import pytest

from ptx.emulated import every_target, run_emulated

pytestmark = pytest.mark.slow


@every_target
def test_all_emulated(target):
    run_emulated(target, {"ops/test_native_cuda.py": "", "ops/test_native_cuda_attention.py": ""}, workers=2)


@every_target
def test_broken_kernels_are_caught_emulated(target):
    run_emulated(target, {"ptx/broken_cuda.py": ""})
