import sys
from types import ModuleType

import pytest

import quietstar
from quietstar.cli import COMMANDS, main


@pytest.fixture
def echo(monkeypatch):
    """A command `echo` whose function notes what it is given; its module must be imported only on use."""
    received = []
    module = ModuleType("echo_command")
    module.run = lambda argv: received.append(argv) or 7
    monkeypatch.setitem(sys.modules, "echo_command", module)
    monkeypatch.setitem(COMMANDS, "echo", ("repeat", "echo_command:run"))
    monkeypatch.setitem(COMMANDS, "broken", ("cannot be imported", "no_such_module:run"))
    return received


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--help", "-x", "3"]])
def test_command_gets_its_arguments_and_gives_the_exit_code(echo, arguments):
    assert main(["echo", *arguments]) == 7
    assert echo == [arguments]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command(capsys, echo, flag):
    assert main([flag]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (line, _) in COMMANDS.items():
        assert any(shown.split() == [name, *line.split()] for shown in lines)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"quietstar {quietstar.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "quietstar: a command must be given"),
        (["enw"], "quietstar: unknown command 'enw', did you mean 'env'?"),
        (["--colour", "env"], "quietstar: unknown command '--colour'"),
    ],
)
def test_bad_usage_is_said_on_stderr_with_exit_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0] == message
    assert "commands:" in captured.err
    assert captured.out == ""


def test_missing_package_is_said_without_a_traceback(capsys, echo):
    assert main(["broken"]) == 1
    assert capsys.readouterr().err.startswith("quietstar broken: No module named 'no_such_module'; pip install")


def test_arguments_default_to_the_command_line(monkeypatch, echo):
    monkeypatch.setattr(sys, "argv", ["quietstar", "echo", "a"])
    assert main() == 7
    assert echo == [["a"]]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_describes_itself(capsys, name):
    with pytest.raises(SystemExit, match=r"^0$"):
        main([name, "--help"])
    assert f"usage: quietstar {name}" in capsys.readouterr().out
