"""Texts on the command line that begin with a dash, and flags that are misspelt."""

import doctest

import pytest

from quietstar import _command_line, cli
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


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["generate", "--model", "m", "--promt", "x"], "--promt: did you mean --prompt?"),
        (["chat", "--modle=m"], "--modle: did you mean --model?"),
        (["export", "m", "--bsae", "d"], "--bsae: did you mean --base?"),
        (["report", "--model", "m", "--thought_length", "2", "--txt", "t"], "--txt: did you mean --text?"),
        (["evaluate", "--tasks", "gsm8k"], "--tasks: did you mean --task?"),
        (["quickstart", "--contrls"], "--contrls: did you mean --controls?"),
        (["estimate", "--lenght", "3"], "--lenght: did you mean --length?"),
        (["star", "--few-shot", "t"], "--few-shot: did you mean --few_shot?"),
        (
            ["train", "--model", "m", "--data", "d", "--learning_rat", "1"],
            "--learning_rat: did you mean --learning_rate?",
        ),
        (["env", "--hepl"], "--hepl: did you mean --help?"),
    ],
)
def test_a_misspelt_flag_suggests_the_nearest(capsys, arguments, suggestion):
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(arguments)
    assert suggestion in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["chat", "--quux", "--model", "m"], ["chat", "--mod"], ["export", "--mdel", "m"], ["chat"]]
)
def test_nothing_is_suggested_without_cause(capsys, arguments):
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(arguments)
    assert "did you mean" not in capsys.readouterr().err
