"""The command ``quietstar quickstart``: trains a model that thinks from scratch, on a CPU, in a few minutes."""

import argparse
import re
import shlex
import sys
import time
from pathlib import Path

from transformers.utils import logging

from quietstar._command_line import SuggestingParser
from quietstar._numbers import SEED
from quietstar.quickstart import experiment, text

HOPS, DEFAULT_HOPS = (2, 3, 4), 3


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code: 2 for invalid arguments."""
    options = _parser().parse_args(arguments)
    folder = Path(options.output_dir)
    logging.disable_progress_bar()
    start = time.perf_counter()
    try:
        SEED.check("--seed", options.seed)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--output_dir must be new or empty, got {folder}")
        prompt = _run(options, folder, shlex.join(["quietstar", "quickstart", *arguments]))
    except ValueError as error:
        print(f"quietstar quickstart: {error}", file=sys.stderr)
        return 2
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(f"\nDone in {minutes} min {seconds} s. The report is {folder / 'report.html'}, to be opened in a browser.")
    print(f"The model is in {folder / 'model'}; go on with\n")
    print(f"  quietstar generate --model {folder / 'model'} --prompt {_quoted(prompt)} --show-thoughts")
    return 0


def _run(options: argparse.Namespace, folder: Path, command: str) -> str:
    """Run the experiment, or its counterpart on text, and return a prompt to try."""
    if options.text is None:
        size = experiment.TINY if options.tiny else experiment.USUAL
        with experiment.one_thread():
            return experiment.run(folder, size, options.seed, options.hops or DEFAULT_HOPS, options.controls, command)
    if options.hops or options.controls:
        raise ValueError("--hops and --controls belong to the world of questions: leave them out with --text")
    return text.run(folder, text.TINY if options.tiny else text.USUAL, options.seed, options.text, command)


def _quoted(prompt: str) -> str:
    """Quote a prompt for a shell, keeping apostrophes readable."""
    return '"' + re.sub(r'(["\\$`])', r"\\\1", prompt) + '"'


def _parser() -> argparse.ArgumentParser:
    parser = SuggestingParser(
        prog="quietstar quickstart",
        description="Train a small model that answers questions only after thinking of the steps in between, and show "
        "what its thoughts do. Takes about a minute and a quarter on a CPU; nothing is downloaded.",
    )
    parser.add_argument(
        "--output_dir", default="quickstart",
        help="new folder for models, results.json and report.html (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of text, weights and thoughts (default: %(default)s)")
    parser.add_argument(
        "--hops", type=int, choices=HOPS,
        help=f"relations in a question; thoughts have one token less (default: {DEFAULT_HOPS})",
    )  # fmt: skip
    parser.add_argument(
        "--controls", action="store_true",
        help="also measure thoughts of lengths 0 to 3, random and filler thoughts, policy weight 0 and ordinary "
        "training; takes about a minute more",
    )  # fmt: skip
    parser.add_argument(
        "--text", metavar="FOLDER|FILE",
        help="train on this text instead, or on the sources of Python's standard library (stdlib), and report honestly "
        "whether thoughts help there; they may well not. Takes about four minutes on two cores",
    )  # fmt: skip
    parser.add_argument(
        "--tiny", action="store_true", help="only a few steps of a tiny model, to check that everything runs"
    )
    return parser
