"""The Triton kernels of mixing, linear cross-entropy and sampling, compiled and emulated."""

import pytest

from ptx.emulated import every_target, run_emulated

pytest.importorskip("triton")

# By the file of an op's tests: those that are quick and between them launch every kernel of it.
QUICK = {
    "test_linear_sample_triton.py": "test_tokens or edges or test_who_stays or (hidden_sizes and bfloat16 and 150)",
    "test_mixing_triton.py": "test_results_and_gradients and bfloat16 and (rows or 32002)",
    "test_linear_cross_entropy_triton.py": "(test_loss_and_gradients and bfloat16) or (test_row_kernel and 50001)",
}
every_file = pytest.mark.parametrize("file", QUICK)


@every_file
@every_target
def test_quick_ones_emulated(target, file):
    run_emulated(target, file, QUICK[file])


@pytest.mark.slow
@every_file
@every_target
def test_all_emulated(target, file):
    run_emulated(target, file)
