"""Every launch of a Triton kernel, by Triton's own launcher and against a driver that launches nothing.

The functions that make the launches run in processes of their own: see ``triton_launches``.
"""

from functools import partial
from unittest.mock import patch

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
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def tensor(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def numbers(*shape):
    return torch.empty(shape, dtype=torch.int64, device=DEVICE)


def attend(
    head=64, dtype=BF16, steps=14, count=None, backward=True, length=2048, batch=2, anchors=None, **options
):  # fmt: skip
    """8 query heads in groups of 4, ``count`` thoughts of 14 steps, laid out as transformers gives them."""

    def laid_out(heads, *sizes):
        rows = torch.Size(sizes).numel()
        return tensor(batch, rows, heads, head, dtype=dtype).transpose(1, 2).unflatten(2, sizes)

    if count is not None:
        anchors = numbers(count)
    count = count or length
    base, thoughts = [laid_out(2, length) for _ in range(2)], [laid_out(2, count, 14) for _ in range(2)]
    inputs = [x.requires_grad_(backward) for x in (laid_out(8, count, steps), *base, *thoughts)]
    output, lse = thought_attention(*inputs, anchors=anchors, return_lse=True, backend="triton", **options)
    if backward:
        torch.autograd.grad(output.sum() + lse.sum(), inputs)


def mix(vocabulary, dtype, rows=100):
    logits = [tensor(3, rows, vocabulary, dtype=dtype).requires_grad_() for _ in range(2)]
    leaves, target = (*logits, tensor(3, rows, dtype=dtype).requires_grad_()), numbers(3, rows)
    loss = mixed_cross_entropy(*leaves, target, backend="triton") + mix_logits(*leaves, backend="triton").sum()
    torch.autograd.grad(loss, leaves)


def lose(vocabulary, dtype, rows=200):
    base, thought, weight = (tensor(size, 512, dtype=dtype).requires_grad_() for size in (50, rows, vocabulary))
    mixing, target, index = tensor(rows, dtype=F32).requires_grad_(), numbers(rows), numbers(rows)
    linear_cross_entropy(thought, weight, target, temperature=3.0, backend="triton")
    loss = mixed_linear_cross_entropy(base, thought, mixing, weight, target, base_index=index, backend="triton")
    torch.autograd.grad(loss, (base, thought, mixing, weight))


def sample(vocabulary, dtype):
    weight = tensor(vocabulary, 512, dtype=dtype)
    linear_sample(tensor(5, 512, dtype=dtype), weight, seed=3, suppress=(1, 2), backend="triton")
    linear_sample(tensor(300, 512, dtype=dtype), weight, seed=3, temperature=0.7, top_k=5, top_p=0.9, backend="triton")


WITH_GLUON = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
FORWARD, QUERY_GRADIENT, KEY_GRADIENT = "forward_kernel", "query_gradient_kernel", "key_gradient_kernel"
if WITH_GLUON:  # on an H100
    FORWARD, QUERY_GRADIENT, KEY_GRADIENT = (f"gluon_{name}" for name in (FORWARD, QUERY_GRADIENT, KEY_GRADIENT))
GRADIENTS = [QUERY_GRADIENT, KEY_GRADIENT, "thought_gradient_kernel"]
COMMON = {  # and the kernels launched, in order
    "training": (attend, [FORWARD, *GRADIENTS]),
    "decoding": (partial(attend, count=2, backward=False), ["forward_kernel", "combine_kernel"]),
    "mixing": (
        partial(mix, 32002, BF16),
        ["cross_entropy_kernel", "mix_kernel", "mix_backward_kernel", "cross_entropy_backward_kernel"],
    ),
    "losses": (
        partial(lose, 32002, BF16),
        ["resident_kernel", "mix_hidden_kernel", "resident_kernel", "split_gradient_kernel", *4 * ["scale_kernel"]],
    ),
    "sampling": (
        partial(sample, 32002, BF16),
        ["matmul_sample_kernel", "pick_kernel", "threshold_kernel", "bounds_kernel", "race_kernel"],
    ),
}
OTHERS = {
    "heads of 128": partial(attend, head=128),
    "heads of 80, float16": partial(attend, head=80, dtype=F16),
    "heads of 256": partial(attend, head=256),
    "float32": partial(attend, head=128, dtype=F32),
    "sampling step": partial(attend, steps=1, head=128),
    "left padding": lambda: attend(key_start=numbers(2)),
    "packed, window, any anchors": lambda: attend(key_start=numbers(2, 2048), window=1000, anchors=numbers(2, 2048)),
    "packed, decoding": lambda: attend(count=2, backward=False, key_start=numbers(2, 2), head=128),
    "negative scale": partial(attend, scale=-0.5),
    "one thought": partial(attend, count=1),
    "strides beyond 32 bits": partial(attend, batch=1, length=1 << 21, head=128),
    "decoding behind 2M tokens": partial(attend, batch=1, length=1 << 21, count=2, backward=False, head=128),
    "float32 vocabulary": lambda: [act(32003, F32) for act in (mix, lose, sample)],
    "float16 vocabulary": lambda: [act(32000, F16) for act in (mix, lose, sample)],
    "large vocabulary": lambda: [act(152064, BF16) for act in (mix, lose, sample)],
    "many rows": lambda: (mix(32002, BF16, rows=1 << 20), lose(32002, BF16, rows=1 << 20)),
}


@pytest.mark.parametrize("name", COMMON)
def test_common_calls(name):
    launches, error = by_name(name)
    assert error is None
    assert [launch.kernel for launch in launches] == COMMON[name][1]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["A100", "L40S", "H100", "B200"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_calls(name, gpu):
    launches, error = launched(__file__, gpu, *OTHERS)[name]
    assert error is None
    assert launches


@triton.jit
def _rows_kernel(x, size, number, BLOCK: tl.constexpr):
    """Grid: rows, blocks."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + tl.program_id(0) * size + columns, number, mask=columns < size)


def rows_kernel(x, size=512, number=1.5, *others, grid=(4, 1), **options):
    _rows_kernel[grid](x, size, number, *others, **{"BLOCK": 512} | options)


def much_shared_memory():
    from quietstar.ops.linear_sample import backend_triton

    with patch.dict(
        backend_triton.TILES, {(backend_triton.SAMPLE, backend_triton.ANY, 16): backend_triton.Tile(64, 256, 4, 8)}
    ):
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


RIGHT = {
    "rows": lambda: rows_kernel(tensor(4, 512)),
    "descriptors": lambda: copy(tensor(64, 64)),
}
WRONG = {  # and what is said
    "too many arguments": (
        lambda: rows_kernel(tensor(4, 512), 512, 1.5, 64, 3, BLOCK=64),
        "TypeError: dynamic_func() got multiple values for argument 'BLOCK'",
    ),
    "a constant is missing": (
        lambda: _rows_kernel[(4,)](tensor(4, 512), 512, 1.5),
        "TypeError: dynamic_func() missing 1 required positional argument: 'BLOCK'",
    ),
    "text": (lambda: rows_kernel("x"), "TypeError: failed to specialize argument of type: str"),
    "an unknown option": (lambda: rows_kernel(tensor(4, 512), number_of_warps=4), "KeyError: 'Keyword argument"),
    "a tensor on the CPU": (lambda: rows_kernel(torch.empty(4, 512)), "ValueError: Pointer argument "),
    "too high a grid": (lambda: rows_kernel(tensor(4, 512), grid=(4, 65536)), "RuntimeError: Triton Error [CUDA]: "),
    "more programs than are counted": (  # which Triton passes over
        lambda: rows_kernel(tensor(4, 512), grid=(1 << 16, 1 << 15)),
        "AssertionError: _rows_kernel was launched 0 times",
    ),
    "too many warps": (lambda: rows_kernel(tensor(4, 512), num_warps=64), "OutOfResources: out of resource: threads"),
    "too much shared memory": (much_shared_memory, "OutOfResources: out of resource: shared memory"),
    "a descriptor of misaligned rows": (lambda: copy(tensor(64, 68)[:, :64]), "RuntimeError: Triton Error [CUDA]: "),
    "a misaligned descriptor": (
        lambda: copy(tensor(65 * 64)[4 : 4 + 64 * 64].view(64, 64)),
        "RuntimeError: Triton Error [CUDA]: ",
    ),
}

LAUNCHES = {name: call for name, (call, _) in (COMMON | WRONG).items()} | OTHERS | RIGHT


def by_name(name):
    return launched(__file__, "H100", *COMMON, *RIGHT, *WRONG)[name]


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_launch(name):
    launches, error = by_name(name)
    assert error is None
    assert len(launches) == 1


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_launch_is_refused(name):
    launches, error = by_name(name)
    assert error.startswith(WRONG[name][1])
    assert launches == []


def test_what_is_kept_of_a_launch():
    (launch,), _ = by_name("rows")
    (_, address), *others = launch.arguments
    assert launch[:4] == ("_rows_kernel", [4, 1, 1], 128, 0)
    assert address % 512 == 0
    assert others == [["u32", 512], ["f32", 1.5], ["u64", 0], ["u64", 0]]
