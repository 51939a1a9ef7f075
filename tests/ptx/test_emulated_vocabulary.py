"""The Triton kernels of mixing, linear cross-entropy and sampling, compiled and emulated."""

import pytest

from ptx.emulated import every_target, kernels_of, run_emulated

pytest.importorskip("triton")

OPS = "linear_sample", "mixing", "linear_cross_entropy"
# By the file of an op's tests: those that are quick, and between them launch every kernel of it.
QUICK = {
    "ops/test_linear_sample_triton.py": "(test_tokens and 1000) or (hidden_sizes and bfloat16 and 150)",
    "ops/test_mixing_triton.py": "test_results_and_gradients and 32002 and (float32 or bfloat16)",
    "ops/test_linear_cross_entropy_triton.py": "(test_loss_and_gradients and bfloat16 and mixed) or "
    "(test_row_kernel and 50001 and bfloat16)",
    "ops/test_linear_cross_entropy_scale.py": "test_kernel and 2000 and bfloat16",
}


@every_target
def test_quick_ones_emulated(target):
    launched = run_emulated(target, QUICK)
    assert set.union(*map(kernels_of, OPS)) - launched == set()


@pytest.mark.slow
@every_target
def test_all_emulated(target):
    run_emulated(target, dict.fromkeys(QUICK, "") | {"ops/test_linear_cross_entropy_scale.py": "test_kernel"})
