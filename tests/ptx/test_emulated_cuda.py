"""The CUDA kernels as nvcc compiles them, emulated."""

import pytest

from ptx.emulated import every_target, run_emulated

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("file", ["test_native_cuda.py", "test_native_cuda_attention.py"])
@every_target
def test_all_emulated(target, file):
    run_emulated(target, file)
