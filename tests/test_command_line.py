"""Texts on the command line that begin with a dash."""

import doctest

import pytest

from quietstar import _command_line
from quietstar._command_line import attach_texts
from quietstar.training.arguments import TrainParser


def test_the_example():
    assert doctest.testmod(_command_line).failed == 0


@pytest.mark.parametrize(
    ("arguments", "attached"),
    [
        (["--prompt", "-x"], ["--prompt=-x"]),
        (["--prompt", "--json", "--json"], ["--prompt=--json", "--json"]),
        (["--prompt=---", "--seed", "-1"], ["--prompt=---", "--seed", "-1"]),
        (["--json", "--prompt"], ["--json", "--prompt"]),
    ],
)
def test_only_the_named_flags_take_what_follows(arguments, attached):
    assert attach_texts(arguments, "--prompt", "--thoughts") == attached


@pytest.mark.parametrize("flag", ["--initial_text", "--initial-text"])
def test_thoughts_may_begin_as_dashes(flag):
    model, *_ = TrainParser().parse(["--model", "m", "--data", "d", flag, "---", "--use_cpu", "--report_to", "none"])
    assert model.initial_text == "---"
