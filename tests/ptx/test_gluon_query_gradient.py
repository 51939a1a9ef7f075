"""The package's query gradient in Gluon: numbers, and as ptxas makes it, products in flight under the exponentials."""

from functools import partial

import pytest
import torch
from compile_kernels import SHARED_MEMORY, Kernel, compiled, is_serialised
from hopper_loops import loops

from ptx.emulated import needs_gluon, run_emulated
from ptx.sass_registers import assembled

pytestmark = needs_gluon

EMULATED = "ptx/emulated_gluon_query_gradient.py"


def test_small_one_emulated():
    launched = run_emulated("sm_90", {EMULATED: "small and bfloat16"})
    assert launched >= {"gluon_query_gradient_kernel", "query_gradient_kernel"}


@pytest.mark.slow
def test_all_emulated():
    run_emulated("sm_90", {EMULATED: ""}, workers=2)


class _Nothing:
    """In the place of a kernel."""

    def __getitem__(self, grid):
        return lambda *_, **__: None


def differentiate(head=128, value_head=None, steps=14, thought_steps=14, dtype=torch.bfloat16, **options):
    """Launch the backward of a call, laid out as transformers gives it; masked by all that there is if by anything."""
    from quietstar.ops.thought_attention import backend_triton
    from quietstar.ops.thought_attention.inputs import Inputs, Mask, Result, ResultGradients

    backend_triton.key_gradient_kernel = backend_triton.thought_gradient_kernel = _Nothing()  # in this process

    def vectors(heads, head, *tokens):
        size = torch.Size(tokens).numel()
        return torch.empty(2, size, heads, head, dtype=dtype).transpose(1, 2).unflatten(2, tokens)

    keys, values = (
        (vectors(2, size, 128), vectors(2, size, 128, thought_steps)) for size in (head, value_head or head)
    )
    inputs = Inputs(vectors(8, head, 128, steps), keys[0], values[0], keys[1], values[1])
    per_anchor = torch.zeros(2, 128, dtype=torch.int64)
    given = {name: per_anchor for name, value in options.items() if value is True}
    result = Result(torch.empty(inputs.output_shape, dtype=dtype), torch.empty(inputs.query.shape[:-1]))
    mask = Mask.of(inputs, **options | given)
    backend_triton.backward(ResultGradients(result.output, result.lse), inputs, mask, result)


CALLS = {
    "training": differentiate,
    "training_64": partial(differentiate, 64),
    "float16": partial(differentiate, dtype=torch.float16),
    "sampling": partial(differentiate, steps=1, thought_steps=7),
    "anchors": partial(differentiate, anchors=True),
    "padding": partial(differentiate, anchors=True, key_start=True, window=1000),
    "window_from_step": partial(differentiate, anchors=True, window=1000, window_from="step"),
    "drafted": partial(differentiate, thought_lengths=True, causal=False, softcap=30.0),
    "value_head": partial(differentiate, 64, 128),
}
globals().update(CALLS)
GROUPS = 2
NUMBER_OF_THE_THREAD = (
    8  # bytes, which ptxas of Triton 3.9 keeps on the stack, for the ends of loops; that of 3.8 does not
)


def launched(name: str) -> Kernel:
    kernels = compiled(__file__, name, (90,))[90]
    return next(kernel for kernel in kernels if kernel.name == "gluon_query_gradient_kernel")


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_exponentials_run_under_products(name):
    kernel = launched(name)
    assert kernel.shared <= SHARED_MEMORY[90]
    assert not is_serialised(kernel)
    assert kernel.spilled <= NUMBER_OF_THE_THREAD
    products = 12 if name.endswith("_64") else 20  # of the loop that masks nothing
    main = [loop for loop in loops(assembled(kernel.ptx, 90)) if loop.products == products]
    print(name, kernel.shared, kernel.spilled, main)
    assert len(main) == GROUPS
    for loop in main:
        assert loop.exponentials >= 32, loop
        assert loop.products_under_exponentials() > 0, loop
        assert loop.spills <= 1
