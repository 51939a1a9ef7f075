"""Argument parsing shared by the commands."""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches


class SuggestingParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that suggests a similar flag for an unknown one."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args=None, namespace=None):
        self._given = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message):
        super().error(message + "".join(map(self._suggestion, dict.fromkeys(self._given))))

    def _suggestion(self, argument: str) -> str:
        flag = argument.partition("=")[0]
        flags = self._option_string_actions
        known = flag in flags or (self.allow_abbrev and any(name.startswith(flag) for name in flags))
        if not flag.startswith("--") or known:
            return ""
        names = [name.removeprefix("--") for name in flags if name.startswith("--")]
        nearest = get_close_matches(flag.removeprefix("--"), names, n=1)
        return f"; {flag}: did you mean --{nearest[0]}?" if nearest else ""


def attach_texts(arguments: Sequence[str], *flags: str) -> list[str]:
    """Rewrite ``--flag TEXT`` as ``--flag=TEXT``, since argparse takes text that begins with a dash for a flag.

    >>> attach_texts(["--prompt", "---", "--json"], "--prompt")
    ['--prompt=---', '--json']
    """
    attached, rest = [], iter(arguments)
    for argument in rest:
        text = next(rest, None) if argument in flags else None
        attached.append(argument if text is None else f"{argument}={text}")
    return attached
