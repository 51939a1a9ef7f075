"""The command ``quietstar report``: writes a page that shows the effect of a model's thoughts on a text."""

import argparse
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from quietstar._command_line import SuggestingParser
from quietstar._numbers import SEED, Interval
from quietstar.evaluation import text_nll
from quietstar.generate import load_model
from quietstar.models.configuration import INTERVALS
from quietstar.report.page import made, render
from quietstar.report.reading import SHORTEST, batch_size, cut, read
from quietstar.report.text_page import Source, text_page, training_history


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code: 2 for invalid arguments."""
    options = _parser().parse_args(arguments)
    logging.disable_progress_bar()
    try:
        page = _page(options, shlex.join(["quietstar", "report", *arguments]))
        Path(options.output).write_text(page, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"quietstar report: {error}", file=sys.stderr)
        return 2
    print(f"The report is in {options.output}; open it in a browser")
    return 0


def _page(options: argparse.Namespace, command: str) -> str:
    start = time.perf_counter()
    SEED.check("--seed", options.seed)
    lengths = _lengths(options.thought_lengths)
    _check_output(Path(options.output), options.overwrite)
    text = _text(Path(options.text))
    tokenizer, model = load_model(options.model, num_thoughts=1)  # one thought before each token, as in generation
    most = model.config.max_position_embeddings
    width = most if options.window is None else options.window
    Interval(int, f"[{SHORTEST}, {most}]").check("--window", width)
    tokens = tokenizer(text, verbose=False)["input_ids"]
    if len(tokens) < 2:
        raise ValueError(f"--text must hold at least two tokens, got {len(tokens)} in {options.text}")
    windows, counted = (part.to(model.device) for part in cut(tokens, width))
    difficulty = None if options.base is None else _difficulty(options.base, windows)

    def progress(batches: Iterable, title: str) -> Iterable:
        return tqdm(batches, desc=title, unit="batch")

    lengths = [length for length in lengths if length != model.config.thought_length]
    reading = read(model, windows, counted, seed=options.seed, thought_lengths=lengths, progress=progress)
    notes = [f"{Path(options.text).name}, {len(tokens):,} tokens."]
    if len(windows) > 1:
        of = f"the model has {most:,} positions" if width == most else "as --window says"
        notes.append(
            f"The text was read in {len(windows)} windows of {windows.shape[1]:,} tokens ({of}); a dashed line stands "
            "between them, and a window sees nothing of those before it."
        )
    facts = made(command, options.seed, time.perf_counter() - start, model.device)
    source = Source(
        f"How {_title(options.model)} thinks", notes, model.config.thought_length, difficulty,
        training_history(options.model), [*facts, ("Model", options.model), ("Text", options.text)],
    )  # fmt: skip
    return render(text_page(tokenizer, reading, source, joined=True))


def _title(model: str) -> str:
    """Return a model's title: for a folder, the last two parts of its path, as folders are often called "model"."""
    folder = Path(model)
    return "/".join(folder.resolve().parts[-2:]).strip("/") if folder.is_dir() else model


def _check_output(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise ValueError(f"--output must be a file, got the folder {path}")
    if not path.parent.is_dir():
        raise ValueError(f"--output must be in a folder that exists, got {path}")
    if path.exists() and not overwrite:
        raise ValueError(f"--output must not exist without --overwrite, got {path}")


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"--text must be a file, got {path}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text must be in UTF-8, got {path}: {error}") from error
    if not text.strip():
        raise ValueError(f"--text must hold text, got none in {path}")
    return text


def _lengths(given: str | None) -> list[int]:
    if given is None:
        return []
    try:
        lengths = sorted({int(length) for length in given.split(",")})
    except ValueError as error:
        raise ValueError(f"--thought_lengths must be integers with commas between, got {given!r}") from error
    for length in lengths:
        INTERVALS["thought_length"].check("--thought_lengths", length)
    return lengths


def _difficulty(name: str, windows: Tensor) -> Tensor:
    """Return the difficulty of tokens, their nll under the model ``name``."""
    try:
        model = AutoModelForCausalLM.from_pretrained(name).to(windows.device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load --base {name}: {error}") from error
    config = model.config
    if int(windows.max()) >= config.vocab_size:
        raise ValueError(
            f"--base must know every token of the text, got {name} with {config.vocab_size} tokens and token "
            f"{int(windows.max())} in the text"
        )
    if windows.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"--base must have {windows.shape[1]} positions, as many as a window has tokens, got "
            f"{config.max_position_embeddings}: a smaller --window would do"
        )
    return text_nll(model, windows, batch_size=batch_size(windows.shape[1], 0))


def _parser() -> argparse.ArgumentParser:
    parser = SuggestingParser(
        prog="quietstar report",
        description="Write an HTML file that shows the effect of a model's thoughts on a text, token by token, next to "
        "that of thoughts that should not help.",
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a Quiet-STaR checkpoint")
    parser.add_argument("--text", required=True, metavar="FILE", help="the text to read, in UTF-8")
    parser.add_argument("-o", "--output", default="report.html", help="the page to write (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")
    parser.add_argument(
        "--base", metavar="MODEL", help="the model before Quiet-STaR, used to rate how hard each token is"
    )
    parser.add_argument(
        "--thought_lengths", metavar="K,K,...", help="also measure thoughts of these lengths, such as 0,1,2,3"
    )
    parser.add_argument(
        "--window", type=int, metavar="N",
        help="read N tokens at a time (default: as many as the model has positions)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the thoughts (default: %(default)s)")
    return parser
