"""Calls whose launches ``counts.py`` counts: small ones of the kinds that training and sampling make, in bfloat16."""

import functools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from quietstar.ops import linear_sample, mix_logits, mixed_cross_entropy, thought_attention
from quietstar.ops._rows import logits_buffer
from quietstar.ops._vocabulary import Softmax
from quietstar.ops.linear_cross_entropy import backends as linear_cross_entropy_backends
from quietstar.ops.linear_cross_entropy.inputs import Scales
from quietstar.ops.thought_attention import backend_cuda
from quietstar.ops.thought_attention.cost import thought_attention_cost

BF16 = torch.bfloat16
VOCABULARY = 32002


class Need(NamedTuple):
    """What a kernel has to do at the least."""

    flop: int = 0
    """In matrix products."""
    bytes: int = 0
    """Of global memory, if everything is read and written once; 0: not known of a kernel alone."""


class Call(NamedTuple):
    """A call that launches kernels; ``run`` returns what each of them needs, by name."""

    run: Callable[[], dict[str, Need]]
    cuda: bool = False


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(BF16)


def _attention(
    head: int, steps: int, thought_steps: int, anchors: int, length: int, *, query_heads: int = 4,
    backward: bool = False, processors: int | None = None, backend: str = "triton",
) -> dict[str, Need]:  # fmt: skip
    """``anchors`` at the end of ``length`` base keys, and one key/value head for 4 of the query.

    Args:
        processors: of the GPU; by default its own. With 1, nothing is split, as in calls that fill it.
    """
    kv_heads = query_heads // 4
    inputs = [_normal(1, query_heads, anchors, steps, head)] + [_normal(1, kv_heads, length, head) for _ in range(2)]
    inputs += [_normal(1, kv_heads, anchors, thought_steps, head) for _ in range(2)]
    inputs = [x.requires_grad_(backward) for x in inputs]
    options = {"anchors": torch.arange(length - anchors, length)}
    from quietstar.ops.thought_attention import triton_launch

    module = triton_launch if backend == "triton" else backend_cuda
    chosen = module.processors if processors is None else lambda device: processors
    with mock.patch.object(module, "processors", chosen):
        output = thought_attention(*inputs, **options, backend=backend)
        if backward:
            output.backward(_normal(*output.shape))

    cost = thought_attention_cost(*inputs, **options)
    # With no base key in sight, what is left is thoughts' own.
    thoughts = thought_attention_cost(*inputs, **options, key_start=options["anchors"][None] + 1).forward.flops
    product = cost.forward.flops // 2, (cost.forward.flops - thoughts) // 2, thoughts // 2
    # Products a kernel takes of a visible pair: the backward's kernels take two of the five twice.
    forward = Need(2 * product[0], cost.forward.bytes)
    return {
        "forward_kernel": forward,
        "gluon_forward_kernel": forward,
        "half_attention_kernel": forward,
        "query_gradient_kernel": Need(3 * product[0]),
        "gluon_query_gradient_kernel": Need(3 * product[0]),
        "key_gradient_kernel": Need(4 * product[1]),
        "thought_gradient_kernel": Need(4 * product[2]),
    }


def _mixing(backend: str) -> dict[str, Need]:
    rows = 4
    base, thought = (_normal(rows, VOCABULARY).requires_grad_() for _ in range(2))
    weight = torch.linspace(0, 1, rows).to(BF16).requires_grad_()
    mix_logits(base, thought, weight, backend=backend).float().square().sum().backward()
    target = torch.arange(rows) * 7919
    mixed_cross_entropy(base, thought, weight, target, reduction="none", backend=backend).sum().backward()
    row = 2 * rows * VOCABULARY  # bytes of a tensor of logits
    names = {"triton": ("cross_entropy_kernel", "cross_entropy_backward_kernel")}.get(
        backend, ("mixed_cross_entropy_kernel", "mixed_cross_entropy_backward_kernel")
    )
    tensors = zip(("mix_kernel", "mix_backward_kernel", *names), (3, 5, 2, 4), strict=True)
    return {kernel: Need(bytes=row * count) for kernel, count in tensors}


def _cross_entropy_rows(backend: str, vocabulary: int = VOCABULARY) -> dict[str, Need]:
    """Float32 logits, and over them their gradient in half precision."""
    kernels = linear_cross_entropy_backends.BACKENDS[backend].load()
    rows = 4
    logits = logits_buffer(rows, vocabulary, torch.float32, torch.device("cpu"))
    logits.copy_(_normal(*logits.shape))
    scales = Scales(torch.ones(rows), None)
    kernels.cross_entropy_rows(logits, Softmax(1.0, None, None), torch.arange(rows), scales, False, BF16)
    need = Need(bytes=6 * rows * vocabulary)
    return dict.fromkeys(("resident_kernel", "streaming_kernel", "cross_entropy_row_kernel"), need)


def _mixed_hidden() -> dict[str, Need]:
    rows, size = 16, 4096
    kernels = linear_cross_entropy_backends.BACKENDS["triton"].load()
    mixed = kernels.MixedHidden(_normal(rows, size), _normal(rows, size), torch.rand(rows), None, [True] * 3)
    mixed.read(slice(0, rows))
    mixed.write_gradient(slice(0, rows), torch.randn(rows, size))
    return {"mix_hidden_kernel": Need(bytes=6 * rows * size), "split_gradient_kernel": Need(bytes=12 * rows * size)}


def _unscaled_gradient() -> dict[str, Need]:
    linear_cross_entropy_backends.BACKENDS["triton"].load().scale_(_normal(64, 4096), torch.ones(()))
    return {}


def _sample(backend: str, rows: int, size: int, vocabulary: int, **options) -> dict[str, Need]:
    linear_sample(_normal(rows, size), _normal(vocabulary, size), seed=3, backend=backend, **options)
    logits = Need(bytes=4 * rows * vocabulary)
    return {
        "matmul_sample_kernel": Need(2 * rows * size * vocabulary, 2 * (rows + vocabulary) * size),
        "threshold_kernel": logits,
        "bounds_kernel": logits,
        "sample_kernel": logits,
    }


def _calls() -> dict[str, Call]:
    kinds = {
        "training, S = T = 14": ((14, 14, 19, 384), {"backward": True, "processors": 1}),
        "training, S = T = 4": ((4, 4, 32, 256), {"backward": True, "processors": 1}),
        "training, S = 1, T = 12": ((1, 12, 32, 128), {"backward": True, "processors": 1}),
        "sampling step, S = 1, T = 12": ((1, 12, 64, 384), {"processors": 1}),
        "decoding": ((1, 12, 1, 1024), {"query_heads": 8}),
    }

    def attention(kind: str, head: int, backend: str) -> Callable[[], dict[str, Need]]:
        sizes, options = kinds[kind]
        return functools.partial(_attention, head, *sizes, **options, backend=backend)

    calls = {f"{kind}, D = {head}": Call(attention(kind, head, "triton")) for kind in kinds for head in (64, 128)}
    calls |= {
        "mixing": Call(functools.partial(_mixing, "triton")),
        "cross-entropy rows": Call(functools.partial(_cross_entropy_rows, "triton")),
        "cross-entropy rows, V = 128256": Call(functools.partial(_cross_entropy_rows, "triton", 128256)),
        "mixed hidden states": Call(_mixed_hidden),
        "sampling in the matmul": Call(functools.partial(_sample, "triton", 16, 1024, 4096)),
        "sampling, top_k": Call(functools.partial(_sample, "triton", 4, 64, VOCABULARY, top_k=50)),
        "sampling, top_p of flat logits": Call(
            functools.partial(_sample, "triton", 2, 64, 128256, top_p=0.9, temperature=8.0)
        ),
        "sampling, top_k and top_p": Call(functools.partial(_sample, "triton", 2, 64, 152064, top_k=1000, top_p=0.9)),
        "gradient of an unscaled loss": Call(_unscaled_gradient),
    }
    in_cuda = {
        f"{kind}, D = {head}": attention(kind, head, "cuda")
        for kind in ("sampling step, S = 1, T = 12", "decoding")
        for head in (64, 128)
    }
    in_cuda |= {
        "mixing": functools.partial(_mixing, "cuda"),
        "cross-entropy rows": functools.partial(_cross_entropy_rows, "cuda"),
        "sampling": functools.partial(_sample, "cuda", 4, 64, VOCABULARY),
    }
    return calls | {f"CUDA: {name}": Call(run, cuda=True) for name, run in in_cuda.items()}


CALLS = _calls()
# Counted by default, in seconds: 15 with all of their compilation, 5 when that is kept.
QUICK = (
    "training, S = T = 14, D = 64", "sampling step, S = 1, T = 12, D = 128", "mixing", "cross-entropy rows",
    "mixed hidden states",
)  # fmt: skip
