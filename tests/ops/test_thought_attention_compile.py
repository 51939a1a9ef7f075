"""The Triton kernels of thought attention, compiled for GPUs that are not there: they fit, and use the matrix units."""

import re

import pytest
import torch
from compile_kernels import GEFORCE, SHARED_MEMORY, compiled, is_serialised, spill_limit

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

BF16, F32 = torch.bfloat16, torch.float32


def call(head, dtype=BF16, steps=14, thought_steps=14, anchors=4096, masked=False, backward=False, packed=False,
         value_head=None, lengths=False, **options):  # fmt: skip
    """Launch the kernels of a call with groups of 4 heads, laid out as transformers gives them."""
    from quietstar.ops.thought_attention import backend_triton
    from quietstar.ops.thought_attention.inputs import Inputs, Mask, ResultGradients

    def tensor(heads, tokens, head=head):
        return torch.empty(2, tokens, heads, head, dtype=dtype, device="meta").transpose(1, 2)

    query = tensor(8, anchors * steps).unflatten(2, (anchors, steps))
    base, thoughts = (
        (tensor(2, tokens), tensor(2, tokens, value_head or head)) for tokens in (4096, anchors * thought_steps)
    )
    thoughts = (x.unflatten(2, (anchors, thought_steps)) for x in thoughts)
    index = {"dtype": torch.int64, "device": "meta"}
    inputs = Inputs(query, *base, *thoughts)
    per_anchor = torch.empty(2, anchors, **index)
    if lengths:
        options["thought_lengths"] = per_anchor
    mask = Mask.of(inputs, torch.empty(anchors, **index), **options)
    if masked:  # by base keys' own masks, all of them
        mask = Mask.of(inputs, per_anchor, per_anchor if packed else torch.empty(2, **index), window=1000, **options)
    result = backend_triton.forward(inputs, mask)
    if backward:  # of an output that went elsewhere than the query came from: rows of dO need their own offsets
        backend_triton.backward(ResultGradients(result.output, None), inputs, mask, result)


def training(head, dtype=BF16, **options):
    call(head, dtype, masked=True, backward=True, **options)


def short_training(head):
    call(head, steps=4, thought_steps=4, masked=True, backward=True)


def sampling_step(head):
    call(head, steps=1, thought_steps=12)


def decoding(head, dtype=BF16, **options):
    from quietstar.ops.thought_attention import triton_launch

    triton_launch.processors = lambda device: 132  # without a GPU it is 1, and nothing is split
    call(head, dtype, **{"anchors": 2} | options)


def decoding_step(head):
    decoding(head, steps=1, thought_steps=12, anchors=16)


def every_position():
    """No masks, and an anchor at each base position: the arguments of the public function that have a default."""
    from quietstar.ops.thought_attention import backend_triton
    from quietstar.ops.thought_attention.inputs import Inputs, Mask, ResultGradients

    def tensor(*sizes):
        return torch.empty(sizes, dtype=BF16, device="meta")

    base, thoughts = tensor(1, 2, 256, 64), tensor(1, 2, 256, 4, 64)
    inputs = Inputs(tensor(1, 8, 256, 4, 64), base, base, thoughts, thoughts)
    result = backend_triton.forward(inputs, Mask.of(inputs))
    backend_triton.backward(ResultGradients(result.output, result.lse), inputs, Mask.of(inputs), result)


def launch_common():
    for head in (64, 128):
        training(head)
        sampling_step(head)
        decoding(head)


def launch_large_heads():
    training(256)
    decoding(256)


def launch_compact():
    for head in (64, 128, 256):
        training(head)


def launch_packed():
    for head in (64, 128, 256):
        training(head, packed=True)


EVERYTHING = {"lengths": True, "causal": False, "window_from": "step", "softcap": 30.0}


def launch_options():
    """Drafted blocks, a model with windows and softcaps, thoughts that fill more than a tile, and all at once."""
    training(128, lengths=True, causal=False)
    training(128, window_from="step", softcap=50.0)
    call(64, steps=200, thought_steps=200, anchors=64, backward=True, lengths=True)
    for head in (64, 128):
        training(head, packed=True, **EVERYTHING)
        decoding(head, masked=True, **EVERYTHING)


def launch_value_heads():
    training(64, value_head=128, lengths=True)
    training(128, value_head=64)
    training(192, value_head=128)


def launch_float32():
    for head in (64, 128, 256):
        training(head, F32)
        decoding(head, F32)


@pytest.fixture(scope="module", params=SHARED_MEMORY, ids="sm_{}".format)
def kernels(request):
    return compiled(__file__, "launch_common")[request.param]


# Bytes that kernels spill: in Gluon the forward with heads of 256 and the query gradient, outside of their loops
# (tests/ptx/test_gluon_forward.py, test_gluon_query_gradient.py), in Triton the query gradient with heads of 128 on
# sm_80, whose tile is otherwise the better one by far (docs/kernel_counts.md).
SPILLED = {("gluon_forward_kernel", 90): 56, ("gluon_query_gradient_kernel", 90): 16, ("query_gradient_kernel", 80): 8}


def assert_fit(kernels, shared_memory, spilled=0):
    for kernel in kernels:
        assert kernel.spilled <= max(spilled, spill_limit(), SPILLED.get(kernel[:2], 0)), kernel[:6]
        assert kernel.shared <= shared_memory, kernel[:6]


def test_kernels_fit(kernels):
    in_triton = [kernel for kernel in kernels if not kernel.name.startswith("gluon")]
    assert len(in_triton) == (8 if len(in_triton) < len(kernels) else 14)
    assert_fit(kernels, SHARED_MEMORY[kernels[0].architecture])


def test_matrix_units_are_used(kernels):
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    found = [x for x in kernels if x.name.endswith(("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"))]
    # Behind the key gradient in Gluon starts that in Triton, to which it leaves anchors in another order.
    assert len(found) == (12 if any(kernel.name.startswith("gluon") for kernel in found) else 10)
    for kernel in found:
        assert instruction[kernel.architecture] in kernel.ptx, kernel[:6]


CALLS = training, short_training, sampling_step, decoding, decoding_step


@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_products_are_in_flight_together(call, head):
    kernels = compiled(__file__, f"{call.__name__}:{head}", (90,))[90]
    assert_fit(kernels, SHARED_MEMORY[90])
    assert any("wgmma" in kernel.ptx for kernel in kernels)
    assert not [kernel.name for kernel in kernels if is_serialised(kernel)]


def test_vectors_are_read_by_16_bytes(kernels):
    for kernel in kernels:
        if kernel.name != "combine_kernel":
            assert not re.search(r"ld\.global[.\w]*\.b16", kernel.ptx), kernel[:6]


@pytest.mark.parametrize("architecture", SHARED_MEMORY, ids="sm_{}".format)
def test_large_heads_fit(architecture):
    assert_fit(compiled(__file__, "launch_large_heads")[architecture], SHARED_MEMORY[architecture])


@pytest.mark.parametrize("architecture", [*SHARED_MEMORY, *GEFORCE], ids="sm_{}".format)
def test_first_keys_of_their_own_fit(architecture):
    assert_fit(
        compiled(__file__, "launch_packed", (architecture,))[architecture], (SHARED_MEMORY | GEFORCE)[architecture]
    )


@pytest.mark.parametrize("architecture", [*SHARED_MEMORY, *GEFORCE], ids="sm_{}".format)
def test_options_fit(architecture):
    """No tile is chosen for an option: some spill with heads of 128 (at most 80 bytes on Hopper, 112 on Blackwell)."""
    kernels = compiled(__file__, "launch_options", (architecture,))[architecture]
    assert_fit(kernels, (SHARED_MEMORY | GEFORCE)[architecture], spilled=112)


@pytest.mark.parametrize("architecture", [*SHARED_MEMORY, *GEFORCE], ids="sm_{}".format)
def test_values_of_another_size_fit(architecture):
    kernels = compiled(__file__, "launch_value_heads", (architecture,))[architecture]
    assert_fit(kernels, (SHARED_MEMORY | GEFORCE)[architecture], spilled=32)


@pytest.mark.parametrize("architecture", GEFORCE, ids="sm_{}".format)
def test_compact_rows_fit(architecture):
    assert_fit(compiled(__file__, "launch_compact", (architecture,))[architecture], GEFORCE[architecture])


@pytest.mark.parametrize("architecture", GEFORCE, ids="sm_{}".format)
def test_float32_fits_the_smallest(architecture):
    """Without tensor cores: a few spilled registers are the lesser evil."""
    for kernel in compiled(__file__, "launch_float32", (architecture,))[architecture]:
        assert kernel.spilled <= spill_limit(torch.float32), kernel[:6]
        assert kernel.shared <= GEFORCE[architecture], kernel[:6]
