"""Which GPUs the kernels run on: by their capability, that of the tensor's device, and what was compiled."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quietstar.ops import _availability, _native, mix_logits
from quietstar.ops._availability import not_built_for, runs_on, too_old, triton_unavailable
from quietstar.ops._backend import Backend, select_backend
from quietstar.ops._native import cuda_unavailable

TURING, AMPERE, GEFORCE, ORIN, ADA, HOPPER = (7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0)
BLACKWELL, ULTRA, THOR, RTX, SPARK = (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)
GPUS = (TURING, AMPERE, GEFORCE, ORIN, ADA, HOPPER, BLACKWELL, ULTRA, THOR, RTX, SPARK)


@pytest.mark.parametrize(
    ("architectures", "gpus"),
    [
        ("75-real", {TURING}),
        ("80-real", {AMPERE, GEFORCE, ADA}),
        ("86-real", {GEFORCE, ADA}),
        ("87-real", {ORIN}),
        ("90-real", {HOPPER}),
        ("90a-real", {HOPPER}),
        ("90a", {HOPPER}),
        ("90a-virtual", {HOPPER}),
        ("100-real", {BLACKWELL, ULTRA}),
        ("100a-real", {BLACKWELL}),
        ("103-real", {ULTRA}),
        ("100f", {BLACKWELL, ULTRA}),
        ("100f-virtual", {BLACKWELL, ULTRA}),
        ("120f-real", {RTX, SPARK}),
        ("121a-real", {SPARK}),
        ("100-virtual", {BLACKWELL, ULTRA, THOR, RTX, SPARK}),
        ("86-virtual", set(GPUS) - {TURING, AMPERE}),
        ("90", {HOPPER, BLACKWELL, ULTRA, THOR, RTX, SPARK}),
        ("80", set(GPUS) - {TURING}),
        ("80-real 90a-real", {AMPERE, GEFORCE, ADA, HOPPER}),
        ("80-real 90a-real 100a-real 100-virtual", set(GPUS) - {TURING, ORIN}),
        ("", set()),
        ("native", set()),
    ],
)
def test_code_runs_on_what_it_was_compiled_for_and_what_is_compatible(architectures, gpus):
    assert {gpu for gpu in GPUS if runs_on(tuple(architectures.split()), gpu)} == gpus


@pytest.fixture
def machine(monkeypatch):
    """Stands in for a machine with GPUs of the given capabilities; returns a tensor on one of them, without memory."""
    monkeypatch.setattr(_availability, "_TRITON_INSTALLED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.version, "hip", None)
    capabilities = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[torch.device(device).index])

    def tensor(*gpus, device=0, dtype=torch.bfloat16):
        capabilities[:] = gpus
        with FakeTensorMode():
            return torch.empty(2, device=f"cuda:{device}", dtype=dtype)

    return tensor


@pytest.fixture
def built_for(monkeypatch):
    """Stands in for a compiled module with kernels for these architectures."""

    def build(architectures):
        monkeypatch.setattr(_native, "_C", object())
        monkeypatch.setattr(_native, "_ARCHITECTURES", tuple(architectures.split()))

    return build


def auto(tensor):
    unavailable = {"triton": triton_unavailable, "cuda": cuda_unavailable, "torch": lambda tensor: None}
    candidates = {name: Backend(why, lambda: None) for name, why in unavailable.items()}
    return select_backend("the_op", "auto", candidates, tensor)


@pytest.mark.parametrize("unavailable", [triton_unavailable, cuda_unavailable])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpus_before_ampere_are_refused(unavailable, dtype, machine, built_for):
    built_for("75 80-real")
    old, new = (machine(AMPERE, TURING, device=i, dtype=dtype) for i in (1, 0))
    assert unavailable(old) == "needs compute capability 8.0 or newer, got 7.5 on cuda:1"
    assert unavailable(new) is None
    assert (auto(old), auto(new)) == ("torch", "triton")


def test_the_module_must_be_built_for_the_gpu_of_the_tensor(machine, built_for, monkeypatch):
    built_for("80-real 90a-real")
    assert cuda_unavailable(machine(RTX, HOPPER, device=1)) is None
    assert cuda_unavailable(machine(RTX, HOPPER)) == (
        "the compiled module was built for 80-real 90a-real, and cuda:0 has compute capability 12.0; "
        "`pip install . -C cmake.define.CMAKE_CUDA_ARCHITECTURES=120-real` builds it for that "
        "(so does the environment variable CUDAARCHS)"
    )
    monkeypatch.setattr(_availability, "_TRITON_INSTALLED", False)
    assert (auto(machine(RTX, HOPPER)), auto(machine(RTX, HOPPER, device=1))) == ("torch", "cuda")


def test_the_numbers_of_amd_are_not_compared(machine, built_for, monkeypatch):
    built_for("80-real")
    monkeypatch.setattr(torch.version, "hip", "7.1")
    tensor = machine(TURING)
    assert triton_unavailable(tensor) is None
    assert cuda_unavailable(tensor) == "its kernels are for GPUs of NVIDIA, and this PyTorch is for AMD's"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to ask")
def test_nothing_is_said_of_a_gpu_that_is_not_there():
    with FakeTensorMode():
        device = torch.empty(2, device="cuda").device
    assert too_old(device) is None
    assert not_built_for(device, ("80-real",)) is None


def test_a_build_without_cuda_says_so(machine, built_for):
    built_for("")
    assert "was built without CUDA" in cuda_unavailable(machine(HOPPER))


@pytest.mark.parametrize("capability", [AMPERE, TURING], ids=str)
def test_capabilities_are_asked_when_compiled_too(capability, monkeypatch):
    """Dynamo traces the choice of a backend; it cannot trace the questions."""
    answer = torch.compiler.disable(lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_capability", answer)
    torch.compiler.reset()

    def first_column(x):
        return x[0] if too_old(x.device) or not_built_for(x.device, ("86-real",)) is None else x[1]

    x = torch.arange(2.0)
    assert torch.compile(first_column, fullgraph=True, backend="eager")(x) == first_column(x)
    assert first_column(x) == (0 if capability == TURING else 1)


def test_a_refusal_names_op_and_source():
    with pytest.raises(ValueError, match=re.escape("backend: 'triton' cannot run mix_logits here: ")):
        mix_logits(*torch.zeros(2, 1, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), backend="triton")
