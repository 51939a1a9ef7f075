"""What only a GPU can show: the torch backends there, that nothing waits for the device, CUDA graphs, and the model.

The Triton and CUDA kernels have their own tests, which run on a GPU where there is one.
"""

from contextlib import contextmanager

import pytest
import torch
from cross_entropy_problem import CASES as CROSS_ENTROPY_CASES
from cross_entropy_problem import Problem, assert_problem_solved
from thought_attention_cases import CASES as ATTENTION_CASES
from thought_attention_cases import INPUTS, case, make_inputs, weighted_sum
from tolerances import assert_as_accurate

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.ops import (
    linear_cross_entropy,
    linear_sample,
    mix_logits,
    mixed_cross_entropy,
    mixed_linear_cross_entropy,
    thought_attention,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
every_backend = pytest.mark.parametrize("backend", [None, "torch", "triton"])


@every_dtype
@pytest.mark.parametrize("name", ATTENTION_CASES)
def test_thought_attention_by_library_calls(name, dtype):
    inputs, options = case(name, dtype, DEVICE)
    grads = torch.randn_like(inputs[0]), torch.randn(inputs[0].shape[:-1], device=DEVICE)
    results = []
    for backend, wide in (("torch", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [x.detach().to(wide).requires_grad_() for x in inputs]
        output, lse = thought_attention(*leaves, **options, return_lse=True, backend=backend)
        weighted_sum(output, lse, *(grad.to(wide) for grad in grads)).backward()
        results.append([output, lse, *(leaf.grad for leaf in leaves)])
    for part, *values in zip(("output", "lse", *INPUTS), *results, strict=True):
        assert_as_accurate(*values, unit=dtype, name=part)


@every_dtype
@pytest.mark.parametrize("name", CROSS_ENTROPY_CASES)
def test_linear_cross_entropies_by_library_calls(name, dtype):
    problem = Problem(dtype=dtype, device=DEVICE, **CROSS_ENTROPY_CASES[name])
    assert_problem_solved(problem, problem.ours("torch"))


@every_dtype
def test_mixing_by_library_calls(dtype):
    logits = torch.randn(2, 9, 1000, device=DEVICE).to(dtype)
    weight, target = torch.randn(9, device=DEVICE).to(dtype), torch.randint(1000, (9,), device=DEVICE)
    results = []
    for backend, wide in (("torch", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [x.detach().to(wide).requires_grad_() for x in (*logits, weight)]
        nll = mixed_cross_entropy(*leaves, target, reduction="none", backend=backend)
        mixed = mix_logits(*leaves, backend=backend)
        gradients = torch.autograd.grad(nll.sum() + mixed.square().mean(), leaves)
        results.append([nll, mixed, *gradients])
    for values in zip(*results, strict=True):
        assert_as_accurate(*values, unit=dtype)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 5, "suppress": (3,)}, {"top_p": 0.7}], ids=str)
def test_samples_are_those_of_the_specification(options, backend):
    hidden, weight = torch.randn(2000, 16, device=DEVICE), torch.randn(1000, 16, device=DEVICE)
    tokens, expected = (linear_sample(hidden, weight, seed=7, backend=b, **options) for b in (backend, "reference"))
    assert (tokens == expected).float().mean() >= 0.999


@contextmanager
def no_waiting():
    """An error where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Calls:
    """Every op once, forward and backward, on tensors that stay where they are."""

    def __init__(self, backend):
        self.backend = backend
        self.attention = make_inputs(length=64, steps=4, head=32, device=DEVICE, dtype=torch.bfloat16)
        self.hidden, self.thought = torch.randn(2, 50, 64, device=DEVICE, requires_grad=True).unbind()
        self.weight = torch.randn(333, 64, device=DEVICE, requires_grad=True)
        self.mixing = torch.randn(50, device=DEVICE, requires_grad=True)
        self.target = torch.randint(333, (50,), device=DEVICE)
        self.seed = torch.tensor(3, device=DEVICE)

    def __call__(self):
        options = {"backend": self.backend}
        logits, others = self.hidden @ self.weight.t(), self.thought @ self.weight.t()
        losses = [
            thought_attention(*self.attention, **options).float().square().sum(),
            linear_cross_entropy(self.hidden, self.weight, self.target, **options),
            mixed_linear_cross_entropy(self.hidden, self.thought, self.mixing, self.weight, self.target, **options),
            mixed_cross_entropy(logits, others, self.mixing, self.target, **options),
            mix_logits(logits, others, self.mixing, **options).square().sum(),
        ]
        leaves = [*self.attention, self.weight, self.mixing]
        tokens = linear_sample(self.hidden, self.weight, seed=self.seed, suppress=(3,), **options)
        return torch.autograd.grad(sum(losses), leaves), tokens


@every_backend
def test_nothing_waits_for_the_device(backend):
    calls = Calls(backend)
    calls()  # compiles
    with no_waiting():
        calls()


@every_backend
def test_cuda_graph(backend):
    """A captured graph gives what the calls give, on new values and with a new seed too."""
    calls = Calls(backend)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls()
    with torch.no_grad():
        calls.weight.mul_(0.5)
    calls.seed.fill_(11)
    graph.replay()
    gradients, tokens = calls()
    assert torch.equal(captured[1], tokens)
    for actual, expected in zip(captured[0], gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@every_backend
def test_training_step_and_generation(backend, monkeypatch):
    """On the device, the losses of the specification on the CPU; in bfloat16 it trains and generates."""
    config = QuietStarConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, thought_length=4, start_thought_token_id=198, end_thought_token_id=199,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = QuietStarForCausalLM(config)
    torch.nn.init.normal_(model.mixing_head[-1].weight)
    text, thoughts = torch.randint(198, (2, 24)), torch.randint(198, (2, 2, 24, 4))
    monkeypatch.setenv("QUIETSTAR_BACKEND", "reference")
    expected = model(text, labels=text, thought_tokens=thoughts)

    monkeypatch.setenv("QUIETSTAR_BACKEND", backend or "auto")
    model.to(DEVICE)
    output = model(text.to(DEVICE), labels=text.to(DEVICE), thought_tokens=thoughts.to(DEVICE))
    torch.testing.assert_close(output.talk_nll.cpu(), expected.talk_nll, rtol=0, atol=1e-3)  # cuBLAS sums otherwise
    model.bfloat16()
    model(text.to(DEVICE), labels=text.to(DEVICE)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    generated = model.eval().generate(text.to(DEVICE), max_new_tokens=4, do_sample=True)
    assert generated.shape == (2, 28)
    assert not torch.isin(generated[:, 24:], torch.tensor([198, 199], device=DEVICE)).any()
