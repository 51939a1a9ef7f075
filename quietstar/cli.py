"""The command `quietstar`: a table of subcommands, each implemented by a function that parses its own arguments."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

import quietstar

# name -> (line of help, "module:function"). The module is imported only when its command is run.
# The function takes the list of arguments after the command's name and returns the exit code.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("train a small model to think, on a CPU, nothing downloaded", "quietstar.quickstart.command:main"),
    "train": ("teach a model to think, or continue with a Quiet-STaR model", "quietstar.training.train:main"),
    "star": ("train a model on its own rationales that led to right answers", "quietstar.star.command:main"),
    "generate": ("continue a prompt with a Quiet-STaR model, showing its thoughts", "quietstar.generate:main"),
    "report": ("show in a web page what a model's thoughts do to a text", "quietstar.report.command:main"),
    "chat": ("talk with a Quiet-STaR model", "quietstar.chat:main"),
    "evaluate": ("measure answers to GSM8K, CommonsenseQA or your own questions", "quietstar.evaluation.command:main"),
    "export": ("write a model's plain base model, for engines that cannot think", "quietstar.export:main"),
    "estimate": ("predict memory and time of a training step before running it", "quietstar.estimate.command:main"),
    "env": ("print versions, devices and usable backends, for bug reports", "quietstar.env:main"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `quietstar COMMAND ...` and return the exit code; ``argv`` defaults to the command line's arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    match arguments:
        case ["-h" | "--help", *_]:
            print(_usage())
            return 0
        case ["--version", *_]:
            print(f"quietstar {quietstar.__version__}")
            return 0
        case []:
            return _refuse("a command must be given")
        case [command, *_] if command not in COMMANDS:
            similar = get_close_matches(command, COMMANDS, n=1)
            return _refuse(f"unknown command {command!r}" + (f", did you mean {similar[0]!r}?" if similar else ""))
        case [command, *rest]:
            return _run(command, rest)


def _run(command: str, arguments: list[str]) -> int:
    module, function = COMMANDS[command][1].split(":")
    try:
        return getattr(import_module(module), function)(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "quietstar":
            raise
        print(f"quietstar {command}: {error}; pip install 'quietstar[train]' installs it", file=sys.stderr)
        return 1


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, (line, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: quietstar [--help] [--version] COMMAND [ARGUMENTS ...]",
            "",
            "Language models that think before every token.",
            "",
            "commands:",
            *lines,
            "",
            "Begin with `quietstar quickstart`: in about a minute a small model learns to think, and a page shows how.",
            "`quietstar COMMAND --help` describes a command's arguments, `quietstar env` what this machine can run.",
        ]
    )


def _refuse(problem: str) -> int:
    print(f"quietstar: {problem}\n\n{_usage()}", file=sys.stderr)
    return 2
