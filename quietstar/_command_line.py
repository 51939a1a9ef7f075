"""What the commands share."""

from collections.abc import Sequence


def attach_texts(arguments: Sequence[str], *flags: str) -> list[str]:
    """``--flag TEXT`` as ``--flag=TEXT``: argparse takes a text that begins with a dash for a flag.

    >>> attach_texts(["--prompt", "---", "--json"], "--prompt")
    ['--prompt=---', '--json']
    """
    attached, rest = [], iter(arguments)
    for argument in rest:
        text = next(rest, None) if argument in flags else None
        attached.append(argument if text is None else f"{argument}={text}")
    return attached
