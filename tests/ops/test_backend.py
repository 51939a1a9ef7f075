"""Which backend is chosen: names, lists of names, and what is said where none can run."""

import re

import pytest
import torch

from quietstar.ops import linear_sample, mix_logits, thought_attention
from quietstar.ops._backend import Backend, request_behind, select_backend

PLACES = ("backend", "QUIETSTAR_BACKEND")
WORKING = Backend(lambda: None, lambda: None)
BROKEN = Backend(lambda: "it is broken", lambda: None)


@pytest.fixture(params=PLACES)
def choose(request, monkeypatch):
    """Choose for an op of which triton and torch can run; the request comes from the argument or the environment."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("QUIETSTAR_BACKEND", raising=False)
    candidates = dict.fromkeys(("cuda", "triton", "cpu", "torch", "reference"), BROKEN)
    candidates |= dict.fromkeys(("triton", "torch"), WORKING)

    def select(requested):
        if request.param == "QUIETSTAR_BACKEND":
            monkeypatch.setenv("QUIETSTAR_BACKEND", requested)
            requested = None
        return select_backend("the_op", requested, candidates)

    select.source = request.param
    return select


@pytest.mark.parametrize(
    ("requested", "name"),
    [
        ("torch", "torch"),
        ("torch,triton", "torch"),
        ("cuda,triton,torch", "triton"),
        (" cuda , torch ", "torch"),
        ("cuda,cpu,auto", "triton"),
        ("auto", "triton"),
        (" auto ", "triton"),
    ],
)
def test_the_first_that_can_run_is_taken(requested, name, choose):
    assert choose(requested) == name


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("fast", "must be None, 'auto' or one of reference, torch, triton, cuda, cpu, or a list such as"),
        ("torch,fast", "got 'torch,fast'"),
        ("torch,", "must be None, 'auto' or one of"),
        (",", "got ','"),
        ("torch;triton", "got 'torch;triton'"),
        ("Torch", "got 'Torch'"),
        ("cuda,torch,cuda", "must name each backend once, got 'cuda,torch,cuda'"),
        ("auto,torch", "must have 'auto' last"),
        ("cuda", "'cuda' cannot run the_op here: it is broken; usable here: "),
        ("cuda", "('cuda,triton' takes the first that can run)"),
        ("cuda,cpu", "'cuda' cannot run the_op here: it is broken; 'cpu' cannot run the_op here: it is broken; usable"),
        ("cuda,cpu", "('cuda,cpu,triton' takes"),
    ],
)
def test_what_cannot_be_chosen_is_explained(requested, message, choose):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        choose(requested)
    assert str(error.value).startswith(choose.source)


def test_an_empty_variable_is_none_and_an_empty_argument_is_wrong(monkeypatch):
    for empty in ("", " "):
        monkeypatch.setenv("QUIETSTAR_BACKEND", empty)
        assert select_backend("the_op", None, {"torch": WORKING}) == "torch"
        with pytest.raises(ValueError, match=r"backend must be None, 'auto' or one of .*, got ' ?'"):
            select_backend("the_op", empty, {"torch": WORKING})


@pytest.mark.parametrize("backend", [3, ["cuda", "torch"]], ids=str)
def test_the_argument_is_text(backend):
    with pytest.raises(TypeError, match=f"backend must be None or a string, got {type(backend).__name__}"):
        select_backend("the_op", backend, {"torch": WORKING})


def test_the_argument_goes_before_the_variable(monkeypatch):
    monkeypatch.setenv("QUIETSTAR_BACKEND", "fast")
    assert select_backend("the_op", "auto", {"torch": WORKING}) == "torch"


def test_an_op_need_not_have_every_backend():
    candidates = {"torch": WORKING}
    assert select_backend("the_op", "cuda,torch", candidates) == "torch"
    with pytest.raises(ValueError, match="'cuda' cannot run the_op here: the op has torch; usable here: torch"):
        select_backend("the_op", "cuda", candidates)


def test_the_interpreter_runs_only_if_triton_is_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    candidates = {"triton": WORKING, "torch": WORKING}
    assert select_backend("the_op", "auto", candidates) == "torch"
    assert select_backend("the_op", "cuda,auto", candidates | {"cuda": BROKEN}) == "torch"
    assert select_backend("the_op", "cuda,triton,torch", candidates) == "triton"
    with pytest.raises(ValueError, match="Triton's interpreter, which is slow, is not for 'auto'"):
        select_backend("the_op", "auto", {"triton": WORKING})


@pytest.mark.parametrize(
    ("requested", "rest"),
    [
        ("cuda", "auto"),
        ("auto", "auto"),
        ("cuda,triton,torch", "triton,torch,auto"),
        ("triton, cuda, auto", "auto"),
        (" ", "auto"),
        ("torch,cuda,reference", "reference,auto"),
    ],
)
def test_what_a_backend_cannot_do_is_for_those_behind_it(requested, rest, monkeypatch):
    monkeypatch.setenv("QUIETSTAR_BACKEND", requested)
    assert request_behind(None, "cuda") == rest
    if requested.strip():
        assert request_behind(requested, "cuda") == rest


def test_the_backward_of_a_backend_without_one_is_that_of_another(monkeypatch):
    """The cuda backend of thought attention has none."""
    from quietstar.ops.thought_attention import api, backends

    ran = []
    for name in ("cuda", "triton"):
        monkeypatch.setattr(backends, f"{name}_unavailable", lambda query: None)
    monkeypatch.setattr(api.ThoughtAttention, "apply", lambda *arguments: ran.append(arguments[-2:]) or (None, None))
    query, key = torch.zeros(1, 1, 3, 2, 8, requires_grad=True), torch.zeros(1, 1, 3, 8)

    def backends_of(backend, interpreted="0"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        thought_attention(query, key, key, query, query, backend=backend)
        return ran.pop()

    assert backends_of("auto") == ("triton", "triton")
    assert backends_of("cuda") == backends_of("cuda,auto") == backends_of("cuda,triton,torch") == ("cuda", "triton")
    assert backends_of("cuda,torch") == backends_of("cuda,torch,triton") == ("cuda", "torch")
    assert backends_of("torch,cuda") == ("torch", "torch")
    assert backends_of("cuda", interpreted="1")[1] in ("cpu", "torch")
    assert backends_of("cuda,triton", interpreted="1") == ("cuda", "triton")
    monkeypatch.setenv("QUIETSTAR_BACKEND", "cuda,torch")
    assert backends_of(None) == ("cuda", "torch")
    with torch.no_grad():
        assert backends_of(None) == ("cuda", "cuda")


@pytest.mark.parametrize("backend", ["cuda,torch", "cuda, auto", None])
def test_a_choice_can_be_compiled(backend, monkeypatch):
    monkeypatch.setenv("QUIETSTAR_BACKEND", "cuda,torch")
    logits, weight = torch.randn(2, 3, 5), torch.randn(3)
    mix = torch.compile(mix_logits, fullgraph=True, backend="eager")
    expected = mix_logits(*logits, weight, backend="reference")
    torch.testing.assert_close(mix(*logits, weight, backend=backend), expected)
    sample = torch.compile(linear_sample, fullgraph=True, backend="eager")
    assert sample(logits[0], logits[1], seed=0, backend=backend).shape == (3,)
