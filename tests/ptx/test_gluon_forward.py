"""The package's forward in Gluon as ptxas makes it: it fits, nothing spills, exponentials run under products."""

from functools import partial

import pytest
import torch
from compile_kernels import SHARED_MEMORY, Kernel, compiled, is_serialised
from hopper_loops import loops

from ptx.emulated import needs_gluon, run_emulated
from ptx.sass_registers import assembled, limits_kept

pytestmark = needs_gluon

EMULATED = "ptx/emulated_gluon_attention.py"


def test_small_one_emulated():
    assert run_emulated("sm_90", {EMULATED: "small and bfloat16"}) == {"gluon_forward_kernel"}


@pytest.mark.slow
def test_all_emulated():
    run_emulated("sm_90", {EMULATED: ""}, workers=2)


def attend(head=128, value_head=None, steps=14, thought_steps=14, count=4096, dtype=torch.bfloat16, **options):
    """Launch the forward of a call, laid out as transformers gives it; masked by all that there is if by anything."""
    from quietstar.ops.thought_attention import backend_triton
    from quietstar.ops.thought_attention.inputs import Inputs, Mask

    def vectors(heads, head, *tokens):
        size = torch.Size(tokens).numel()
        return torch.empty(2, size, heads, head, dtype=dtype, device="meta").transpose(1, 2).unflatten(2, tokens)

    keys, values = (
        (vectors(2, size, 4096), vectors(2, size, count, thought_steps)) for size in (head, value_head or head)
    )
    inputs = Inputs(vectors(8, head, count, steps), keys[0], values[0], keys[1], values[1])
    per_anchor = torch.empty(2, count, dtype=torch.int64, device="meta")
    given = {name: per_anchor for name, value in options.items() if value is True}
    backend_triton.forward(inputs, Mask.of(inputs, **options | given))


CALLS = {
    "training": attend,
    "training_64": partial(attend, 64),
    "float16": partial(attend, dtype=torch.float16),
    "short_training": partial(attend, steps=4, thought_steps=4),
    "sampling": partial(attend, steps=1, thought_steps=12),
    "sampling_64": partial(attend, 64, steps=1, thought_steps=12),
    "anchors": partial(attend, anchors=True),
    "padding": partial(attend, anchors=True, key_start=True, window=1000),
    "window_from_step": partial(attend, anchors=True, window=1000, window_from="step"),
    "drafted": partial(attend, thought_lengths=True, causal=False, softcap=30.0),
    "value_head": partial(attend, 64, 128),
    "head_256": partial(attend, 256),
}
globals().update(CALLS)
FULL, MASKED = 2, 2  # loops of each kind: one in each group of consumers
SPILLED = {"head_256": 24}  # bytes, outside of these loops


def launched(name: str) -> Kernel:
    (kernel,) = compiled(__file__, name, (90,))[90]
    return kernel


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_softmax_runs_under_products(name):
    kernel = launched(name)
    assert kernel.name == "gluon_forward_kernel"
    assert kernel.shared <= SHARED_MEMORY[90]
    assert kernel.spilled <= SPILLED.get(name, 0)
    assert not is_serialised(kernel)
    found = loops(assembled(kernel.ptx, 90))
    most = max(loop.products for loop in found)  # blocks of thoughts are narrower
    main = [loop for loop in found if loop.products == most]
    print(name, kernel.shared, main)
    assert len(main) == FULL + MASKED
    for loop in main:
        assert loop.products_under_exponentials() > 0, loop
        assert loop.spills == 0


@pytest.mark.slow
def test_registers_suffice():
    """240 for the consumers, 24 for the producer: ptxas keeps each part within its number."""
    kernel = launched("training")
    assert {240, 24} <= limits_kept(kernel.ptx, kernel.registers)
