"""The Triton kernels of the vocabulary ops, compiled for GPUs that are not there: they fit, and access wide."""

import re

import pytest
import torch
from compile_kernels import SHARED_MEMORY, compiled, spill_limit

pytest.importorskip("triton")

BF16, F32 = torch.bfloat16, torch.float32


def launch_all():
    from quietstar.ops._rows import logits_buffer
    from quietstar.ops._vocabulary import Softmax
    from quietstar.ops.linear_cross_entropy.backend_triton import MixedHidden, cross_entropy_rows
    from quietstar.ops.linear_cross_entropy.inputs import Scales
    from quietstar.ops.linear_cross_entropy.triton_scale import scale_
    from quietstar.ops.linear_sample.backend_triton import sample
    from quietstar.ops.linear_sample.inputs import Sampling
    from quietstar.ops.linear_sample.triton_rows import sample_rows
    from quietstar.ops.mixing import backend_triton as mixing
    from quietstar.ops.mixing.backends import CrossEntropy, Mix

    row, number, seed = torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.tensor(0)
    for vocabulary, dtype in [(32000, BF16), (32002, BF16), (32003, F32)]:
        logits = torch.zeros(2, vocabulary, dtype=dtype)
        mix = Mix(logits, logits, row)
        mixing.mix(mix)
        mixing.mix_backward(logits, mix, [True] * 3)
        mixing.cross_entropy(mix, number)
        mixing.cross_entropy_backward(row, mix, number, CrossEntropy(row, row, row, row), [True] * 2)
    for vocabulary, dtype in [(32002, BF16), (32002, F32), (128256, BF16)]:
        logits = logits_buffer(2, vocabulary, F32, torch.device("cpu"))
        for softcap, entropy_scale in ((None, None), (None, row), (30.0, None), (30.0, row)):
            scales = Scales(row, entropy_scale)
            cross_entropy_rows(logits, Softmax(0.7, softcap, None), number, scales, scales.entropy is not None, dtype)
    hidden = torch.zeros(2, 4096, dtype=BF16)
    scale_(hidden, torch.ones(()))
    for index in (None, number):
        mixed = MixedHidden(hidden, hidden, row, index, [True] * 3)
        mixed.read(slice(0, 2))
        mixed.write_gradient(slice(0, 2), hidden.float())
    for vocabulary in (32064, 152064):
        for kept in ((5, 0.9), (5, None), (None, 0.9)):
            sample_rows(torch.zeros(2, vocabulary), 0, Sampling(seed, 0.7, 30.0, None, *kept))
    for rows, dtype in [(1, BF16), (32, BF16), (64, BF16), (128, BF16), (128, F32)]:
        hidden, weight = torch.zeros(rows, 4096, dtype=dtype), torch.zeros(32002, 4096, dtype=dtype)
        for softcap in (None, 30.0):
            sample(hidden, weight, Sampling(seed, 0.7, softcap, number, None, None))


@pytest.fixture(scope="module", params=SHARED_MEMORY, ids="sm_{}".format)
def kernels(request):
    return compiled(__file__, "launch_all")[request.param]


@pytest.mark.slow
def test_kernels_fit(kernels):
    assert len(kernels) >= 34
    for kernel in kernels:
        assert kernel.spilled <= spill_limit(), kernel[:6]
        assert kernel.shared <= SHARED_MEMORY[kernel.architecture], kernel[:6]


def widths(ptx):
    """Bytes of the accesses of memory by vectors, without those of single numbers of a row."""
    found = re.findall(r"(?:ld|st)\.global[.\w]*?(?:\.v(\d))?\.b(\d+)", ptx)
    found = [int(n or 1) * int(bits) // 8 for n, bits in found]
    return found + [int(n) for n in re.findall(r"cp\.async[.\w]*\s+\[[^]]*\],\s*\[[^]]*\],\s*(?:0x)?(\d+)", ptx)]


@pytest.mark.slow
def test_a_row_of_logits_is_accessed_by_16_bytes(kernels):
    """Also at V = 32002, thanks to the padding of the logits' buffer."""
    for kernel in kernels:
        if kernel.name == "resident_kernel":
            assert widths(kernel.ptx).count(16) >= 8, kernel[:6]


@pytest.mark.slow
def test_matrix_units_are_used(kernels):
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for kernel in kernels:
        if kernel.name == "matmul_sample_kernel" and "bf16" in kernel.ptx:
            assert instruction[kernel.architecture] in kernel.ptx, kernel[:6]
