"""On a GPU that is not there (``pretended_gpu``): which backend is taken, what is refused, and that waiting is seen."""

import re

import pytest
import torch
from pretended_gpu import DEVICE, nothing_waits
from thought_attention_cases import make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from quietstar.ops import (
    _native,
    _registration,
    linear_cross_entropy,
    linear_sample,
    mix_logits,
    mixed_cross_entropy,
    mixed_linear_cross_entropy,
    thought_attention,
)

ROWS, SIZE, VOCABULARY = 6, 8, 40
BF16 = torch.bfloat16


class Arguments:
    """Of every op, on the pretended GPU."""

    def __init__(self, dtype=BF16, head=8):
        def tensor(*shape):
            return torch.empty(shape, dtype=dtype, device=DEVICE)

        self.attention = [x.detach() for x in make_inputs(head=head, dtype=dtype, device=DEVICE)]
        self.logits = tensor(ROWS, VOCABULARY), tensor(ROWS, VOCABULARY), tensor(ROWS)
        self.hidden, self.weight = tensor(ROWS, SIZE), tensor(VOCABULARY, SIZE)
        self.target = torch.empty(ROWS, dtype=torch.int64, device=DEVICE)
        self.mixed = self.hidden, self.hidden, tensor(ROWS), self.weight, self.target


CALLS = {
    "thought_attention": lambda x, **options: thought_attention(*x.attention, **options),
    "mix_logits": lambda x, **options: mix_logits(*x.logits, **options),
    "mixed_cross_entropy": lambda x, **options: mixed_cross_entropy(*x.logits, x.target, **options),
    "linear_cross_entropy": lambda x, **options: linear_cross_entropy(x.hidden, x.weight, x.target, **options),
    "mixed_linear_cross_entropy": lambda x, **options: mixed_linear_cross_entropy(*x.mixed, **options),
    "linear_sample": lambda x, **options: linear_sample(x.hidden, x.weight, seed=3, **options),
}
every_call = pytest.mark.parametrize("op", CALLS)


class Taken(TorchDispatchMode):
    """Which backends run."""

    def __init__(self):
        super().__init__()
        self.backends = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "quietstar":
            self.backends.add(args[-1])
        return function(*args, **(kwargs or {}))


@every_call
@pytest.mark.parametrize(
    ("gpu", "dtype", "backend"),
    [
        ("T4", BF16, "torch"),
        ("A100", BF16, "triton"),
        ("L40S", BF16, "triton"),
        ("H100", torch.float32, "triton"),
        ("B200", torch.float16, "triton"),
        ("H100", torch.float64, "torch"),
    ],
    indirect=["gpu"],
)
def test_the_backend_that_is_taken(op, gpu, dtype, backend):
    pytest.importorskip("triton")
    with Taken() as taken:
        CALLS[op](Arguments(dtype))
    assert taken.backends == {backend}


@every_call
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("gpu", ["T4"], indirect=True)
def test_an_older_gpu_is_refused(op, backend, gpu, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(_native, "_C", object())
    monkeypatch.setattr(_native, "_ARCHITECTURES", ("75-virtual",))
    message = f"backend: '{backend}' cannot run {op} here: needs compute capability 8.0 or newer, got 7.5 on cuda:0; "
    with pytest.raises(ValueError, match=re.escape(message + "usable here: torch, reference")):
        CALLS[op](Arguments(), backend=backend)


@every_call
def test_kernels_of_the_cpu_are_refused(op, gpu, monkeypatch):
    monkeypatch.setattr(_native, "_C", object())
    with pytest.raises(ValueError, match=r"'cpu' cannot run .*: its kernels need tensors on the CPU, got cuda; usable"):
        CALLS[op](Arguments(), backend="cpu")


def moved(arguments, name, index=0):
    """The arguments with one tensor, or one of several, on the CPU."""
    value = getattr(arguments, name)
    tensors = [value] if isinstance(value, torch.Tensor) else list(value)
    tensors[index] = torch.empty_like(tensors[index], device="cpu")
    setattr(arguments, name, tensors[0] if isinstance(value, torch.Tensor) else tensors)
    return arguments


@pytest.mark.parametrize(
    ("op", "name", "index", "message"),
    [
        ("thought_attention", "attention", 3, "thought_key must be on the device of query, cuda:0, got cpu"),
        ("mix_logits", "logits", 2, "mixing_weight must be on the device of base_logits, cuda:0, got cpu"),
        ("mixed_cross_entropy", "target", 0, "target must be on the device of base_logits, cuda:0, got cpu"),
        ("linear_cross_entropy", "weight", 0, "weight must be on the device of hidden, cuda:0, got cpu"),
        ("mixed_linear_cross_entropy", "mixed", 4, "target must be on the device of base_hidden, cuda:0, got cpu"),
        ("linear_sample", "weight", 0, "weight must be on the device of hidden, cuda:0, got cpu"),
    ],
)
def test_tensors_on_the_cpu_are_refused(op, name, index, message, gpu_backend):
    with nothing_waits(), torch.no_grad(), pytest.raises(ValueError, match=re.escape(message)):
        CALLS[op](moved(Arguments(), name, index), backend=gpu_backend)


@pytest.mark.parametrize(
    ("op", "options", "message"),
    [
        ("thought_attention", {"anchors": "int16"}, "anchors must be int32 or int64"),
        ("thought_attention", {"key_start": "cpu"}, "key_start must be on the device of query"),
        ("thought_attention", {"window": 0}, "window must be None or an integer >= 1"),
        ("mixed_cross_entropy", {"reduction": "most"}, "reduction must be one of"),
        ("linear_cross_entropy", {"temperature": 0}, "temperature must be positive"),
        ("linear_cross_entropy", {"suppress": (3, VOCABULARY)}, "suppress must be token ids in"),
        ("linear_cross_entropy", {"suppress": "cpu"}, "suppress must be on the device of weight"),
        ("linear_cross_entropy", {"reduction": "sum", "row_weight": "cpu"}, "row_weight must be"),
        ("mixed_linear_cross_entropy", {"base_index": "cpu"}, "base_index must be on the device of base_hidden"),
        ("mixed_linear_cross_entropy", {"base_index": "int16"}, "base_index must be int32 or int64"),
        ("linear_sample", {"top_p": 2}, "top_p must be in"),
        ("linear_sample", {"suppress": range(VOCABULARY)}, "suppress must leave at least one token"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_without_waiting(op, options, message, gpu_backend):
    def value(given):
        if given == "int16":
            return torch.empty(ROWS, dtype=torch.int16, device=DEVICE)
        return torch.empty(ROWS, dtype=torch.int64) if given == "cpu" else given

    options = {name: value(given) for name, given in options.items()}
    with nothing_waits(), torch.no_grad(), pytest.raises((TypeError, ValueError), match=f"^{message}"):
        CALLS[op](Arguments(), backend=gpu_backend, **options)


LAYOUTS = {
    "in the order of other dimensions": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every other element": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "behind another": lambda x: torch.cat((x, x), dim=-1)[..., 1 : x.shape[-1] + 1],
    "one for all": lambda x: x.flatten()[:1].view([1] * x.dim()).expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@every_call
def test_any_layout(op, layout, gpu_backend):
    """Results are laid out as is said of them: see ``pretended_gpu``."""
    arguments = Arguments()
    leaves = []
    for name in ("attention", "logits", "mixed"):
        made = [LAYOUTS[layout](x) for x in getattr(arguments, name)]
        setattr(arguments, name, [x.requires_grad_() if x.is_floating_point() else x for x in made])
    arguments.hidden, _, _, arguments.weight, arguments.target = arguments.mixed
    with nothing_waits():
        result = CALLS[op](arguments, backend=gpu_backend)
        if result.requires_grad:
            leaves = [x for x in (*arguments.attention, *arguments.logits, *arguments.mixed) if x.requires_grad]
            torch.autograd.grad(result.sum(), leaves, allow_unused=True)


WAITING = {
    "a number": lambda x: x[0].item(),
    "a branch": lambda x: bool((x > 0).all()),
    "a list": lambda x: x.tolist(),
    "equality": lambda x: torch.equal(x, x + 1),
    "places": lambda x: x.nonzero(),
    "rows of a mask": lambda x: x[x > 0],
    "columns of a mask": lambda x: x[None][:, x > 0],
    "what a mask selects": lambda x: x.masked_select(x > 0),
    "writing where a mask is": lambda x: x.index_put_((x > 0,), x.new_ones(())),
    "setting where a mask is": lambda x: x.__setitem__(x > 0, 1),
    "repeats": lambda x: x.repeat_interleave(torch.ones_like(x, dtype=torch.int64)),
    "unique values": lambda x: x.unique(),
    "to the CPU": lambda x: x.cpu(),
    "from the CPU": lambda x: torch.ones(3).to(x.device),
    "a list from the CPU": lambda x: torch.tensor([1, 2], device=x.device),
    "a number from the CPU": lambda x: torch.tensor(1, device=x.device),
    "a copy from the CPU": lambda x: x.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_seen(name, gpu):
    x = torch.ones(3, device=DEVICE)
    with nothing_waits(), pytest.raises(AssertionError, match=r"waits for|counts what|copies between"):
        WAITING[name](x)


def test_what_does_not_wait_is_left_alone(gpu):
    x, places = torch.ones(3, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with nothing_waits():
        x[None][:, places] += x.masked_fill(x > 0, 2).fill_(torch.tensor(1.0))[places].sort().values
        torch.ones(3)[torch.ones(3) > 0] = 1


@pytest.mark.parametrize(
    "fake",
    [
        lambda x: x.new_empty(3, 2),
        lambda x: x.new_empty(2, 3, dtype=torch.float64),
        lambda x: x.new_empty(3, 2).t(),
        lambda x: torch.empty(2, 3),
    ],
    ids=["shape", "dtype", "strides", "device"],
)
def test_what_stands_for_an_op_is_compared(fake, gpu, monkeypatch):
    library = torch.library.Library("quietstar", "FRAGMENT")
    monkeypatch.setattr(_registration, "_LIBRARY", library)
    op = _registration.register_op("test_of_pretended_gpu(Tensor x) -> Tensor", lambda x: x + 1, fake)
    with pytest.raises(AssertionError, match="test_of_pretended_gpu"):
        op(torch.ones(2, 3, device=DEVICE))
    library._destroy()
