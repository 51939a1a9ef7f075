"""Every launch of a Triton kernel, by Triton's own launcher and against a driver that launches nothing.

The functions that make the launches run in processes of their own: see ``triton_launches``.
"""

import pytest
import torch
from pretended_gpu import DEVICE
from triton_launches import launched

from quietstar.ops import (
    linear_cross_entropy,
    linear_sample,
    mix_logits,
    mixed_cross_entropy,
    mixed_linear_cross_entropy,
    thought_attention,
)

triton = pytest.importorskip("triton")

import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def tensor(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def numbers(*shape):
    return torch.empty(shape, dtype=torch.int64, device=DEVICE)


def attend(head=64, dtype=BF16, steps=14, anchors=2048, backward=True, length=2048, batch=2, **options):
    """8 query heads in groups of 4, thoughts of 14 steps, laid out as transformers gives them."""

    def laid_out(heads, *sizes):
        count = torch.Size(sizes).numel()
        return tensor(batch, count, heads, head, dtype=dtype).transpose(1, 2).unflatten(2, sizes)

    inputs = laid_out(8, anchors, steps), *(laid_out(2, *x) for x in ((length,), (length,), (anchors, 14), (anchors, 14)))
    inputs = [x.requires_grad_(backward) for x in inputs]
    if anchors != length:
        options.setdefault("anchors", numbers(anchors))
    output, lse = thought_attention(*inputs, return_lse=True, backend="triton", **options)
    if backward:
        torch.autograd.grad(output.sum() + lse.sum(), inputs)


def mix(vocabulary, dtype):
    logits = [tensor(3, 100, vocabulary, dtype=dtype).requires_grad_() for _ in range(2)]
    leaves = *logits, tensor(3, 100, dtype=dtype).requires_grad_()
    loss = mixed_cross_entropy(*leaves, numbers(3, 100), backend="triton") + mix_logits(*leaves, backend="triton").sum()
    torch.autograd.grad(loss, leaves)


def lose(vocabulary, dtype):
    base, thought, weight = (
        tensor(*shape, dtype=dtype).requires_grad_() for shape in ((50, 512), (200, 512), (vocabulary, 512))
    )
    mixing, target, index = tensor(200, dtype=F32).requires_grad_(), numbers(200), numbers(200)
    linear_cross_entropy(thought, weight, target, temperature=3.0, backend="triton")
    loss = mixed_linear_cross_entropy(base, thought, mixing, weight, target, base_index=index, backend="triton")
    torch.autograd.grad(loss, (base, thought, mixing, weight))


def sample(vocabulary, dtype):
    weight = tensor(vocabulary, 512, dtype=dtype)
    linear_sample(tensor(5, 512, dtype=dtype), weight, seed=3, suppress=(1, 2), backend="triton")
    linear_sample(
        tensor(300, 512, dtype=dtype), weight, seed=3, temperature=0.7, top_k=5, top_p=0.9, backend="triton"
    )


def launch_training():
    attend()


def launch_decoding():
    attend(anchors=2, backward=False)


def launch_mixing():
    mix(32002, BF16)


def launch_losses():
    lose(32002, BF16)


def launch_sampling():
    sample(32002, BF16)


GRADIENTS = ["query_gradient_kernel", "key_gradient_kernel", "thought_gradient_kernel"]
COMMON = {
    "launch_training": ["forward_kernel", *GRADIENTS],
    "launch_decoding": ["forward_kernel", "combine_kernel"],
    "launch_mixing": [
        "cross_entropy_kernel", "mix_kernel", "mix_backward_kernel", "cross_entropy_backward_kernel",
    ],
    "launch_losses": ["resident_kernel", "mix_hidden_kernel", "resident_kernel", "split_gradient_kernel"],
    "launch_sampling": ["matmul_sample_kernel", "pick_kernel", "threshold_kernel", "bounds_kernel", "race_kernel"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMON)
def test_common_calls(name):
    launches, error = launched(__file__, "H100", *COMMON, *RIGHT, *WRONG)[name]
    assert error is None
    assert [launch.kernel for launch in launches] == COMMON[name]


@triton.jit
def _rows_kernel(x, size, number, BLOCK: tl.constexpr):
    """Grid: rows, blocks."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + tl.program_id(0) * size + columns, number, mask=columns < size)


def rows_kernel(x, size=512, number=1.5, *others, grid=(4, 1), **options):
    _rows_kernel[grid](x, size, number, *others, **{"BLOCK": 512} | options)


def launch_right():
    rows_kernel(tensor(4, 512))


def launch_with_too_much():
    rows_kernel(tensor(4, 512), 512, 1.5, 64, 3, BLOCK=64)


def launch_with_too_little():
    _rows_kernel[(4,)](tensor(4, 512), 512, 1.5)


def launch_with_text():
    rows_kernel("x")


def launch_with_an_unknown_option():
    rows_kernel(tensor(4, 512), number_of_warps=4)


def launch_on_the_cpu():
    rows_kernel(torch.empty(4, 512))


def launch_many_columns():
    rows_kernel(tensor(4, 512), grid=(4, 65536))


def launch_more_programs_than_are_counted():
    rows_kernel(tensor(4, 512), grid=(1 << 16, 1 << 15))


def launch_many_warps():
    rows_kernel(tensor(4, 512), num_warps=64)


def launch_with_much_shared_memory():
    from quietstar.ops.linear_sample import triton_matmul

    triton_matmul._TILES[16] = triton_matmul.Tile(64, 256, 4, 8)
    linear_sample(tensor(5, 2048), tensor(32002, 2048), seed=3, backend="triton")


@triton.jit
def _copy_kernel(source, target):
    target.store([0, 0], source.load([0, 0]))


def copy(source):
    from triton.tools.tensor_descriptor import TensorDescriptor

    def described(x):
        descriptor = TensorDescriptor.from_tensor(tensor(64, 64), [16, 32])
        descriptor.base, descriptor.strides = x, x.stride()  # past the checks of Triton itself
        return descriptor

    _copy_kernel[(1,)](described(source), described(tensor(64, 64)))


def launch_with_descriptors():
    copy(tensor(64, 64))


def launch_with_a_descriptor_of_misaligned_rows():
    copy(tensor(64, 68)[:, :64])


def launch_with_a_misaligned_descriptor():
    copy(tensor(65, 64).flatten()[4 : 4 + 64 * 64].view(64, 64))


RIGHT = ["launch_right", "launch_with_descriptors"]
WRONG = {
    "launch_with_too_much": "TypeError: ",
    "launch_with_too_little": "TypeError: ",
    "launch_with_text": "Error: ",
    "launch_with_an_unknown_option": "KeyError: 'Keyword argument number_of_warps was specified but unrecognised",
    "launch_on_the_cpu": "ValueError: Pointer argument ",
    "launch_many_columns": "RuntimeError: Triton Error [CUDA]: invalid argument",
    "launch_more_programs_than_are_counted": "AssertionError: _rows_kernel was launched 0 times",
    "launch_many_warps": "OutOfResources: out of resource: threads, Required: 2048",
    "launch_with_much_shared_memory": "OutOfResources: out of resource: shared memory",
    "launch_with_a_descriptor_of_misaligned_rows": "RuntimeError: Triton Error [CUDA]: ",
    "launch_with_a_misaligned_descriptor": "RuntimeError: Triton Error [CUDA]: ",
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_launch(name):
    launches, error = launched(__file__, "H100", *COMMON, *RIGHT, *WRONG)[name]
    assert error is None
    assert len(launches) == 1


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_launch_is_refused(name):
    launches, error = launched(__file__, "H100", *COMMON, *RIGHT, *WRONG)[name]
    assert WRONG[name] in error
    assert launches == []


def test_what_is_kept_of_a_launch():
    ((launch,), _) = launched(__file__, "H100", *COMMON, *RIGHT, *WRONG)["launch_right"]
    (_, address), *others = launch.arguments
    assert launch[:4] == ("_rows_kernel", [4, 1, 1], 128, 0)
    assert address % 512 == 0
    assert others == [["u32", 512], ["f32", 1.5], ["u64", 0], ["u64", 0]]
