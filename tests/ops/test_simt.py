"""The shim that runs CUDA kernels on a CPU: it notices what is wrong, in kernels and in how they are called."""

import pytest
import simt
import torch
from thought_attention_cases import make_inputs

from quietstar.ops import linear_cross_entropy, linear_sample, mixed_cross_entropy, thought_attention

pytestmark = pytest.mark.skipif(simt.DEVICE == "cuda", reason="the GPU itself runs the kernels")


@pytest.fixture(autouse=True)
def shim(monkeypatch, poisoned_memory):
    module = simt.use_cuda_kernels(monkeypatch)
    yield module
    module.set_fault("")


def mixed(dtype=torch.bfloat16):
    base, thought = torch.randn(2, 3, 5000).to(dtype)
    return mixed_cross_entropy(base, thought, torch.ones(3), torch.arange(3), reduction="none", backend="cuda")


def linear(**options):
    return linear_cross_entropy(torch.randn(3, 8), torch.randn(3000, 8), torch.arange(3), backend="cuda", **options)


def sampled(**options):
    return linear_sample(torch.randn(20, 8), torch.randn(5000, 8) * 0.1, seed=2, backend="cuda", **options)


def attention(dtype):
    inputs = make_inputs(batch=1, length=300, num_anchors=20, steps=1, thought_steps=5, head=32, dtype=dtype)
    with torch.no_grad():
        return thought_attention(*inputs, anchors=torch.arange(200, 220), backend="cuda")


CALLS = {
    "mixed cross-entropy": mixed,
    "linear cross-entropy": linear,
    "linear cross-entropy, entropy": lambda: linear(reduction="sum", entropy_weight=0.5, softcap=2.0),
    "sample": sampled,
    "sample, top_p": lambda: sampled(top_p=0.9),
    "attention": lambda: attention(torch.bfloat16),
    "attention, float32": lambda: attention(torch.float32),
}


@pytest.mark.parametrize(
    ("fault", "name"),
    [("barrier", name) for name in CALLS] + [("shuffle", name) for name in CALLS] + [("copy", "attention")],
)
def test_a_broken_kernel_is_noticed(fault, name, shim):
    """Without barriers, with shuffles that exchange nothing, without waiting for copies, results are wrong."""

    def run(fault):
        shim.set_fault(fault)
        torch.manual_seed(0)
        return CALLS[name]()

    expected = run("")
    assert torch.equal(run(""), expected)
    for seed in range(3):
        shim.set_random_seed(seed)
        try:
            if not torch.equal(run(fault), expected):
                return
        except RuntimeError:  # the shim's own: threads that can never go on
            return
    pytest.fail("the results are those of the whole kernel")


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("one_lane_waits_elsewhere", "threads wait for others that never come"),
        ("lanes_in_different_operations", "lanes of a warp wait in different operations"),
        ("half_a_warp", "only whole warps are modelled"),
    ],
)
def test_a_deadlock_is_an_error(kernel, message, shim):
    with pytest.raises(RuntimeError, match=message):
        getattr(shim, kernel)()
    assert mixed().isfinite().all()  # and the next kernel runs


ROW = torch.zeros(8)
MIX = {
    "dtype": 0, "base": ROW.data_ptr(), "base_stride": 8, "thought": ROW.data_ptr(), "thought_stride": 8,
    "weight": ROW.data_ptr(), "mixed": ROW.data_ptr(), "rows": 1, "vocabulary": 8, "device": 0, "stream": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": 0}, "base must not be null"),
        ({"mixed": 0}, "mixed must not be null"),
        ({"thought": ROW.data_ptr() + 2}, "thought must be aligned to 4 bytes"),
        ({"rows": -1}, "rows must be at least 0, got -1"),
        ({"vocabulary": 0}, "vocabulary must be at least 1, got 0"),
        ({"base_stride": -8}, "stride must be at least 0, got -8"),
        ({"dtype": 3}, r"dtype must be 0 \(float32\), 1 \(bfloat16\) or 2 \(float16\), got 3"),
        ({"device": -1}, "device must be at least 0, got -1"),
    ],
)
def test_a_wrong_pointer_contract_raises(change, message, shim):
    shim.cuda.mix(*MIX.values())
    with pytest.raises(ValueError, match=message):
        shim.cuda.mix(*{**MIX, **change}.values())


def test_wrong_contracts_of_the_other_functions(shim):
    at = ROW.data_ptr()
    thought, base, rows = (at, [8, 8, 8, 8]), (at, [8, 8, 8]), (at, [8, 8, 8])
    tensors = {
        "query": thought, "key": base, "value": base, "thought_key": thought, "thought_value": thought,
        "output": thought, "lse": rows,
    }  # fmt: skip
    sizes = [1, 1, 1, 1, 1, 1, 1, 8, 8, 1]  # B, Hq, Hkv, P, S, T, L, D, Dv, splits
    nothing = 0, [0, 0]

    def attend(place=None, size=None, key_start=nothing, **changed):
        given = sizes[:place] if size is None else [size if i == place else x for i, x in enumerate(sizes)]
        mask = ((at, [1, 1]), key_start, nothing, 0, False, True, 1.0, 0.0)
        shim.cuda.thought_attention(0, given, mask, tensors | changed, 0, 0)

    with pytest.raises(ValueError, match="sizes must be B, Hq, Hkv, P, S, T, L, D, Dv, splits, got 9"):
        attend(9)
    with pytest.raises(ValueError, match="Hq must be a multiple of Hkv, got 1"):
        attend(2, 2)
    with pytest.raises(ValueError, match="D must be at most 128, got 129"):
        attend(7, 129)
    with pytest.raises(ValueError, match="Dv must be at most 128, got 129"):
        attend(8, 129)
    with pytest.raises(ValueError, match="T must be at least 2, got 1"):
        attend(4, 2)
    with pytest.raises(ValueError, match="query must come with 4 strides, got 3"):
        attend(query=base)
    with pytest.raises(ValueError, match="key_start must come with 2 strides, got 1"):
        attend(key_start=(at, [1]))
    with pytest.raises(ValueError, match="key_start must have an anchor stride of at most 1, got 2"):
        attend(key_start=(at, [1, 2]))
    with pytest.raises(ValueError, match="key_start must be aligned to 8 bytes"):
        attend(key_start=(at + 4, [1, 1]))
    with pytest.raises(ValueError, match="split_output must be among the tensors"):
        attend(9, 2)
    with pytest.raises(ValueError, match="logits must be aligned to 16 bytes"):
        shim.cuda.sample_rows(at + 4, at, at, 0, 1.0, 0.0, 0, 1.0, 1, 1, 0, 0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        shim.cuda.sample_rows(at, at, at, 0, 0.0, 0.0, 0, 1.0, 1, 1, 0, 0)
    with pytest.raises(ValueError, match="stride must be at least 8, got 7"):
        shim.cuda.cross_entropy_rows(0, at, 7, at, 0, 0, at, 0, 1.0, 0.0, 1, 8, 0, 0)
