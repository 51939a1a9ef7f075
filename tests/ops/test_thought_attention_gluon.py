"""When the kernels in Gluon run, and what becomes of values that no row sees."""

import pytest
import torch
from thought_attention_cases import CASES, case, make_inputs

pytest.importorskip("triton")

from quietstar.ops import _launch_table
from quietstar.ops.thought_attention import backend_triton, gluon_launch, triton_launch
from quietstar.ops.thought_attention.inputs import Inputs, Mask

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(gluon_launch, "_interpreted", lambda: False)
    monkeypatch.setattr(_launch_table, "architecture", lambda: _launch_table.HOPPER)
    monkeypatch.setattr(gluon_launch, "_triton_too_old", lambda: None)


def reason(inputs):
    inputs = Inputs(*inputs)
    return gluon_launch.unavailable(inputs, Mask.of(inputs))


def moved(inputs, index, change):
    inputs = [x.detach() for x in inputs]
    inputs[index] = change(inputs[index])
    return inputs


AVAILABLE = {
    "bfloat16": lambda: make_inputs(head=128, dtype=BF16),
    "float16": lambda: make_inputs(head=128, dtype=F16),
    "D and Dv": lambda: make_inputs(head=128, value_head=64, dtype=BF16),
    "D = 80": lambda: make_inputs(head=80, dtype=BF16),
    "tokens before heads": lambda: [
        x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in make_inputs(head=64, dtype=BF16)
    ],
    "strides of single ones": lambda: moved(
        make_inputs(head=64, dtype=BF16, batch=1), 1, lambda x: x.as_strided(x.shape, (3, *x.stride()[1:]))
    ),
    "any queries": lambda: moved(make_inputs(head=64, dtype=BF16), 0, lambda x: x[:1].expand(x.shape)),
}


@pytest.mark.parametrize("name", AVAILABLE)
def test_available(name, hopper):
    assert reason(AVAILABLE[name]()) is None


UNAVAILABLE = {
    "float32": (lambda: make_inputs(head=64), "needs bfloat16 or float16, got torch.float32"),
    "D = 20": (
        lambda: make_inputs(head=20, value_head=64, dtype=BF16),
        "needs heads of a multiple of 8 elements, at most 256, got D = 20",
    ),
    "Dv = 264": (
        lambda: make_inputs(head=64, value_head=264, dtype=BF16),
        "needs heads of a multiple of 8 elements, at most 256, got Dv = 264",
    ),
    "one batch for all": (
        lambda: moved(make_inputs(head=64, dtype=BF16), 1, lambda x: x[:1].expand(x.shape)),
        "needs vectors of key 16 bytes, or a multiple, apart, got strides (0, 384, 64, 1)",
    ),
    "misaligned rows": (
        lambda: moved(make_inputs(head=64, dtype=BF16), 2, lambda x: torch.cat((x, x[..., :4]), -1)[..., :64]),
        "needs vectors of value 16 bytes, or a multiple, apart, got strides (816, 408, 68, 1)",
    ),
    "elements apart": (
        lambda: moved(make_inputs(head=64, dtype=BF16), 3, lambda x: torch.stack((x, x), -1)[..., 0]),
        "needs vectors of thought_key 16 bytes, or a multiple, apart, got strides (4608, 2304, 384, 128, 2)",
    ),
    "a misaligned tensor": (
        lambda: moved(make_inputs(head=64, dtype=BF16), 4, lambda x: torch.cat((x, x), -1)[..., 4:68]),
        "needs vectors of thought_value 16 bytes, or a multiple, apart, got strides (4608, 2304, 384, 128, 1)",
    ),
}


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_unavailable(name, hopper):
    make, said = UNAVAILABLE[name]
    assert reason(make()) == said


@pytest.mark.parametrize("family", ["ampere", "blackwell", "compact"])
def test_unavailable_on_other_gpus(family, hopper, monkeypatch):
    monkeypatch.setattr(_launch_table, "architecture", lambda: family)
    assert reason(make_inputs(head=64, dtype=BF16)) == "needs a GPU of compute capability 9.0"


def test_unavailable_to_the_interpreter(hopper, monkeypatch):
    monkeypatch.setattr(gluon_launch, "_interpreted", lambda: True)
    assert reason(make_inputs(head=64, dtype=F16)) == "is not for Triton's interpreter"


@pytest.mark.parametrize(
    ("version", "old"), [("3.6.0", True), ("3.7.1", True), ("3.8.0", False), ("3.10.0+git", False)]
)
def test_versions_of_triton(version, old, monkeypatch):
    monkeypatch.setattr(gluon_launch.triton, "__version__", version)
    found = gluon_launch._triton_too_old.__wrapped__()
    assert found == (f"needs Triton >= 3.8, found {version}" if old else None)


@pytest.mark.parametrize(
    ("sizes", "taken"),
    [({"num_anchors": 11}, True), ({"num_anchors": 10}, False), ({"num_anchors": 11, "length": 257}, False)],
    ids=["128 rows", "fewer rows", "split keys"],
)
def test_what_is_left_to_decoding(sizes, taken, hopper, monkeypatch):
    """An anchor has 12 rows here; two programs do not fill 132 multiprocessors, and can split more than 256 keys."""
    calls = []
    monkeypatch.setattr(triton_launch, "processors", lambda device: 132)
    monkeypatch.setattr(gluon_launch, "forward", lambda *_: calls.append("Gluon"))
    monkeypatch.setattr(backend_triton, "forward_kernel", _Counter(calls))
    monkeypatch.setattr(backend_triton, "combine_kernel", _Counter([]))
    inputs = Inputs(*make_inputs(**{"batch": 1, "kv_heads": 1, "length": 40} | sizes, head=64, dtype=BF16))
    backend_triton.forward(inputs, Mask.of(inputs, torch.zeros(sizes["num_anchors"], dtype=torch.int64)))
    assert calls == ["Gluon" if taken else "Triton"]


class _Counter:
    """In the place of a kernel."""

    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *_, **__: self.calls.append("Triton")


@pytest.mark.parametrize("name", CASES)
def test_values_that_no_row_sees_are_zeros(name):
    """The others are untouched; inactive anchors are left to the kernel."""
    inputs, options = case(name)
    inputs = Inputs(*(x.detach() for x in inputs))
    mask = Mask.of(inputs, **options)
    made = gluon_launch.seen_values(inputs, mask, backend_triton._Seen.of(inputs, mask))
    assert made[:2] == inputs[:2]

    active = mask.without_idle_anchors(inputs)
    anchors = active.anchors_in(inputs.key.shape[2], inputs.key.device)
    keys = torch.arange(inputs.key.shape[2])
    base = active.sees_base(anchors, active.key_start, keys, inputs)
    if mask.thought_lengths is not None:
        base = base & ~mask.inactive(inputs)[..., None]
    base = base.any(2).any(1)[:, None, :, None].expand(inputs.value.shape)
    assert torch.equal(made.value, torch.where(base, inputs.value, 0))

    steps = mask.sees_thought(mask.thought_lengths, inputs, keys.device).any(2)[:, None, :, :, None]
    idle = (anchors < 0)[:, None, :, None, None]
    steps, idle = (x.expand(inputs.thought_value.shape) for x in (steps, idle))
    changed = made.thought_value != inputs.thought_value
    assert torch.equal(changed[~idle], ~steps[~idle])
    assert not made.thought_value[changed].any()
