"""The package's key gradient in Gluon: right when emulated; it fits, and its exponentials run under products."""

from functools import partial

import pytest
import torch
from compile_kernels import SHARED_MEMORY, Kernel, compiled, is_serialised
from hopper_loops import loops
from versions import version_of

from ptx.emulated import needs_gluon, run_emulated
from ptx.sass_registers import assembled, limits_kept

pytestmark = needs_gluon

EMULATED = "ptx/emulated_gluon_key_gradient.py"


def test_small_ones_emulated():
    run_emulated("sm_90", {EMULATED: "small and bfloat16"})


@pytest.mark.slow
def test_all_emulated():
    run_emulated("sm_90", {EMULATED: ""}, workers=2)


def differentiate(head=128, value_head=None, steps=14, group=4, dtype=torch.bfloat16, anchors=None, **options):
    """Launch the backward of a call, laid out as transformers gives it."""
    from quietstar.ops.thought_attention import backend_triton, triton_launch
    from quietstar.ops.thought_attention.inputs import Inputs, Mask, Result, ResultGradients

    triton_launch.processors = lambda device: 132  # so that rows are split

    def vectors(heads, head, *tokens):
        size = torch.Size(tokens).numel()
        return torch.empty(2, size, heads, head, dtype=dtype, device="meta").transpose(1, 2).unflatten(2, tokens)

    keys, values = (
        (vectors(2, size, 2048), vectors(2, size, anchors or 2048, steps)) for size in (head, value_head or head)
    )
    inputs = Inputs(vectors(2 * group, head, anchors or 2048, steps), keys[0], values[0], keys[1], values[1])
    output = vectors(2 * group, value_head or head, anchors or 2048, steps)
    lse = torch.empty(output.shape[:-1], device="meta")
    index = {"dtype": torch.int64, "device": "meta"}
    if anchors:
        options["anchors"] = torch.empty(anchors, **index)
    if "key_start" in options:
        options["key_start"] = torch.empty(2, options["key_start"], **index)
    mask = Mask.of(inputs, **options)
    backend_triton.backward(ResultGradients(output, None), inputs, mask, Result(output, lse))


CALLS = {
    "training": differentiate,
    "training_64": partial(differentiate, 64),
    "float16": partial(differentiate, dtype=torch.float16),
    "sampling_step": partial(differentiate, steps=1, group=8),
    "anchors": partial(differentiate, anchors=1000),
    "padding_and_window": partial(differentiate, anchors=1000, key_start=1, window=1000),
    "documents": partial(differentiate, anchors=1000, key_start=1000),
    "value_head": partial(differentiate, 64, 128),
}
globals().update(CALLS)
# Bytes, with Triton 3.8 and its ptxas; of the loops over full tiles in training one has one access.
SPILLED = 112 if version_of("triton") == (3, 8) else 0


def launched(name: str) -> Kernel:
    (kernel,) = (x for x in compiled(__file__, name, (90,))[90] if x.name == "gluon_key_gradient_kernel")
    return kernel


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_exponentials_run_under_products(name):
    kernel = launched(name)
    assert kernel.shared <= SHARED_MEMORY[90]
    assert kernel.spilled <= SPILLED
    assert not is_serialised(kernel)
    main = [loop for loop in loops(assembled(kernel.ptx, 90)) if loop.exponentials]
    assert len(main) == 4  # one over masked tiles and one over full ones in each group of consumers
    full = sorted(main, key=lambda loop: loop.size)[:2]  # in the others exponentials are between the products of dP
    for loop in full:
        assert loop.exponentials == 32, loop
        assert loop.products_under_exponentials() > 0, loop
    assert SPILLED or not any(loop.spills for loop in main)


@pytest.mark.slow
def test_registers_suffice():
    """240 for the consumers, 24 for the producer: ptxas keeps each part within its number."""
    kernel = launched("training")
    assert {240, 24} <= limits_kept(kernel.ptx, kernel.registers)
