"""Gradients of the linear cross-entropies are moved again only if they have to be, on a GPU that is not there."""

import pytest
import torch
from backends import triton_dtypes
from pretended_gpu import DEVICE as GPU

from quietstar.ops import _rows, linear_cross_entropy
from quietstar.ops._head_matmuls import add_weight_gradient
from quietstar.ops.linear_cross_entropy import chunks
from quietstar.ops.linear_cross_entropy.backends import BACKENDS

triton_scale = pytest.importorskip("quietstar.ops.linear_cross_entropy.triton_scale")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0, float("nan")])
@pytest.mark.parametrize("dtype", triton_dtypes(), ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (90, 2000)], ids=str)
def test_kernel(shape, dtype, factor):
    gradient, factor = torch.randn(shape, device=DEVICE).to(dtype), torch.tensor(factor, device=DEVICE)
    expected = (gradient.float() * factor).to(dtype)
    triton_scale.scale_(gradient, factor)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


def loss_of(dtype, backend, rows=200):
    leaves = [torch.randn(n, 8, dtype=dtype, device=GPU, requires_grad=True) for n in (rows, 300)]
    return linear_cross_entropy(*leaves, torch.randint(300, (rows,), device=GPU), backend=backend), leaves


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_only_a_graph_that_is_kept_has_its_gradients_copied(dtype, gpu_backend, monkeypatch):
    if gpu_backend == "reference":
        pytest.skip("its gradients are made by autograd")
    scaled = []
    monkeypatch.setattr(BACKENDS[gpu_backend].load(), "scale_", lambda gradient, factor: scaled.append(gradient))
    loss, leaves = loss_of(dtype, gpu_backend)
    torch.autograd.grad(loss, leaves, retain_graph=True)
    assert not scaled
    gradients = torch.autograd.grad(loss, leaves)
    assert [x.data_ptr() for x in scaled] == [x.data_ptr() for x in gradients]


@pytest.mark.parametrize("most_rows", [200, 99])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_one_chunk_makes_the_gradient_of_the_weight_in_its_dtype(dtype, most_rows, gpu_backend, monkeypatch):
    """More are added up in float32; in float16 a sum over rows might be too large before it is scaled."""
    if gpu_backend == "reference":
        pytest.skip("its gradients are made by autograd")
    made = []

    def record(total, d_logits, hidden, dtype):
        made.append(dtype)
        return add_weight_gradient(total, d_logits, hidden, dtype)

    monkeypatch.setattr(chunks, "add_weight_gradient", record)
    monkeypatch.setitem(_rows.CHUNK_BYTES, "cuda", most_rows * 300 * 4)
    loss, leaves = loss_of(dtype, gpu_backend)
    assert torch.autograd.grad(loss, leaves)[1].dtype == dtype
    narrow = most_rows == 200 and dtype == torch.bfloat16
    assert made == ([dtype] if narrow else [torch.float32] * -(-200 // most_rows))


def test_a_sum_rounded_by_its_matmul():
    d_logits, hidden = torch.randn(50, 7).bfloat16(), torch.randn(50, 5).bfloat16()
    exact = d_logits.double().t() @ hidden.double()
    total = add_weight_gradient(None, d_logits, hidden, torch.bfloat16)
    assert total.dtype == torch.bfloat16
    torch.testing.assert_close(total.double(), exact, rtol=2**-8, atol=1e-5)
