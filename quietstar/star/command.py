"""The command ``quietstar star``: runs STaR, the predecessor of Quiet-STaR, on question-answer pairs."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import fields

from tqdm import tqdm
from transformers.utils import logging

from quietstar._command_line import SuggestingParser, attach_texts
from quietstar.evaluation import load_task
from quietstar.evaluation.tasks import TASKS
from quietstar.models.export import check_new
from quietstar.star.prompts import Format, read_examples
from quietstar.star.rounds import Settings, star

_ROW = "{:>5}  {:>7}  {:>10}  {:>6}  {:>5}  {:>8}  {:>7}"
_TEXTS = {
    "template": "template of a question; its rationale follows it",
    "hint": "template of a question with its answer as a hint",
    "separator": "text between rationale and answer",
    "stop": "text that ends an answer",
}
_NUMBERS = {
    "rounds": "how often to write rationales and learn from them",
    "steps": "optimizer steps in the first round",
    "growth": "factor by which the number of steps grows in each round",
    "learning_rate": "learning rate of AdamW",
    "warmup_steps": "steps during which the learning rate rises; then it is constant",
    "batch_size": "questions or texts at a time",
    "gradient_accumulation_steps": "batches per step",
    "max_new_tokens": "at most this many tokens of rationale and answer together",
    "temperature": "sampling temperature of rationales; 0: greedy",
    "seed": "seed of samples and of the order of texts",
}


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code: 2 for invalid arguments or if there is nothing to learn from."""
    options = _parser().parse_args(attach_texts(arguments, *(f"--{name}" for name in _TEXTS)))
    logging.disable_progress_bar()
    try:
        folder = check_new("--output_dir", options.output_dir)
        settings = Settings(
            **{name: getattr(options, name) for name in (*_NUMBERS, "examples")}, rationalise=options.rationalise
        )
        form = Format(**{name: getattr(options, name) for name in _TEXTS})
        examples = read_examples(options.few_shot, form)
        task = load_task(options.task, options.data, options.limit)
        held_out = None if options.eval_data is None else load_task(options.task, options.eval_data, options.limit)
        star(
            options.model, task, examples, folder, held_out=held_out, form=form, settings=settings,
            dtype=options.dtype, progress=_progress, report=_print,
        )  # fmt: skip
    except (OSError, TypeError, ValueError, FloatingPointError) as error:
        print(f"quietstar star: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    print(f"\nThe model is in {folder / 'model'}, what it learnt from in {folder / 'rationales'}.")
    return 0


def _progress(batches: Iterable, title: str) -> Iterable:
    return tqdm(batches, title, unit="batch", leave=False)


def _print(results: dict) -> None:
    """Print a line of the table as soon as its results are known."""
    if not results["rounds"]:
        print(f"{results['questions']} questions of {results['data']}")
        print(_ROW.format("round", "right", "with hints", "kept", "steps", "held-out", "seconds"))
        print(_ROW.format("base", "", "", "", "", _percent(results["base_accuracy"]), ""), flush=True)
        return
    row = results["rounds"][-1]
    shares = [_percent(row[name]) for name in ("right", "right_with_rationalisation", "accuracy")]
    print(
        _ROW.format(row["round"], *shares[:2], row["kept"], row["steps"], shares[2], f"{row['seconds']:.0f}"),
        flush=True,
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _parser() -> argparse.ArgumentParser:
    parser = SuggestingParser(
        prog="quietstar star",
        description="Train a causal language model on those of its own rationales that lead to right answers: STaR "
        "(arXiv 2203.14465). The defaults of steps, texts per step and learning rate are the authors'.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--data", required=True, help="JSON Lines with the columns question and answer")
    parser.add_argument("--few_shot", required=True, help="text file of worked examples, separated by blank lines")
    parser.add_argument("--eval_data", help="held-out questions, like --data, to measure the accuracy on")
    parser.add_argument("--output_dir", default="star", help="new folder (default: %(default)s)")
    parser.add_argument(
        "--task", choices=TASKS, default="qa",
        help="how answers are read: qa, one of the answers in the data; gsm8k, a number; commonsense_qa, a letter "
        "(with the columns question, choices, answerKey) (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, help="use only the first N questions of both files")
    form, settings = ({field.name: field.default for field in fields(kind)} for kind in (Format, Settings))
    for name, text in _TEXTS.items():
        parser.add_argument(f"--{name}", default=form[name], help=f"{text} (default: {form[name]!r})")
    for name, text in _NUMBERS.items():
        number = type(settings[name])
        parser.add_argument(f"--{name}", type=number, default=settings[name], help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--examples", choices=("always", "first"), default=settings["examples"],
        help="show the worked examples in every round, or in the first one only (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--no_rationalisation", dest="rationalise", action="store_false", help="do not retry wrong answers with a hint"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the weights (default: %(default)s)",
    )
    return parser
