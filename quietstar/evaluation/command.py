"""The command ``quietstar evaluate``: measures answers by the paper's probability and by exact match."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

import quietstar
from quietstar._command_line import SuggestingParser
from quietstar._numbers import SEED, Interval, check_numbers
from quietstar.evaluation.answers import AnswerProbabilities, answer_probabilities
from quietstar.evaluation.means import Mean, token_mean
from quietstar.evaluation.said import greedy_answers, majority, sampled_answers
from quietstar.evaluation.tasks import TASKS, Task, load_task
from quietstar.generate import add_gain_threshold, check_thinking, load_model, number_or

INTERVALS = {
    "samples": Interval(int, "[1, 1000]"),
    "max_new_tokens": Interval(int, "[1, 1000000]"),
    "limit": Interval(int, "[1, inf)"),
    "batch_size": Interval(int, "[1, inf)"),
    "seed": SEED,
}


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code: 2 for invalid arguments."""
    options = _parser().parse_args(arguments)
    logging.disable_progress_bar()
    try:
        check_numbers(INTERVALS, vars(options), prefix="--")
        check_thinking(options)
        if options.gain_threshold is not None and options.think != "learned":
            raise ValueError(f"--think must be learned with --gain_threshold, got {options.think}")
        _check_output(options)
        task = load_task(options.task, options.data, options.limit)
        results = _evaluate(options, task)
        if options.output is not None:
            Path(options.output).write_text(json.dumps(results, indent=1) + "\n")
    except (OSError, ValueError) as error:
        print(f"quietstar evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def _check_output(options: argparse.Namespace) -> None:
    """Check that the output file can be written, before hours of work rather than after."""
    if options.output is None:
        if options.overwrite:
            raise ValueError("--overwrite must be left out without --output")
        return
    output = Path(options.output)
    if output.is_dir() or (output.exists() and not options.overwrite):
        wanted = "a file" if output.is_dir() else "a new file without --overwrite"
        raise ValueError(f"--output must be {wanted}, got {output}, which exists")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output must be in a folder that exists, got {output}")


def _evaluate(options: argparse.Namespace, task: Task) -> dict[str, object]:
    """Compute and print all measures of a task, and return them for JSON."""
    tokenizer, model = load_model(options.model)
    if options.gain_threshold is not None:
        model.generation_config.gain_threshold = options.gain_threshold
    if options.samples is not None:  # checked now rather than after the other measures
        most = model.config.max_position_embeddings - 1
        Interval(int, f"[1, {most}]").check("--max_new_tokens", options.max_new_tokens)
    common = {"think": options.think, "batch_size": options.batch_size, "seed": options.seed}
    spoken = common | {"draft_length": options.draft_length}
    probability = answer_probabilities(model, tokenizer, task, **common, progress=_progress("probabilities"))
    said = greedy_answers(model, tokenizer, task, **spoken, progress=_progress("answers"))
    columns = {"said": said}
    right = [question.answer for question in task.questions]
    means = {
        "answer_probability": _mean([[value] for value in probability.values.tolist() if not math.isnan(value)]),
        "exact_match": _mean([[answer == wanted] for answer, wanted in zip(said, right, strict=True)]),
    }
    if options.samples is not None:
        columns["samples"] = votes = sampled_answers(
            model, tokenizer, task, options.samples, max_new_tokens=options.max_new_tokens, **spoken,
            progress=_progress("samples"),
        )  # fmt: skip
        pairs = list(zip(votes, right, strict=True))
        means["sampled"] = _mean([[answer == wanted for answer in given] for given, wanted in pairs])
        means[f"maj@{options.samples}"] = _mean([[majority(given) == wanted] for given, wanted in pairs])
    _print(options, task, means, probability)
    return {
        "task": task.name, "data": task.source, "model": options.model, "think": options.think, "seed": options.seed,
        "gain_threshold": options.gain_threshold,
        "quietstar": quietstar.__version__, "questions": len(task.questions), "cropped": probability.cropped,
        "left_out": int(probability.values.isnan().sum()),
        "valid_tokens": tokenizer.convert_ids_to_tokens(probability.valid_tokens),
        **{name: _known(mean.value) for name, mean in means.items()},
        **{f"{name}_error": _known(mean.error) for name, mean in means.items()},
        "answers": _records(task, columns | {"probability": probability.values.tolist()}),
    }  # fmt: skip


def _mean(values: list[list[float]]) -> Mean:
    """Average over questions, each with the same number of values; NaN if there are none."""
    return token_mean(torch.tensor(values or [[math.nan]], dtype=torch.float64))


def _known(value: object) -> object:
    """Replace NaN, which JSON does not have, by None."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _records(task: Task, columns: dict[str, list]) -> list[dict[str, object]]:
    """Return one record per question."""
    rows = zip(*columns.values(), strict=True)
    return [
        {"prompt": question.prompt, "answer": question.answer}
        | {name: _known(value) for name, value in zip(columns, row, strict=True)}
        for question, row in zip(task.questions, rows, strict=True)
    ]


_TITLES = {
    "answer_probability": "probability of the answer (the paper's accuracy)",
    "exact_match": "exact match, answered at once",
    "sampled": "exact match of samples",
}


def _print(options: argparse.Namespace, task: Task, means: dict[str, Mean], probability: AnswerProbabilities) -> None:
    print(f"{task.name}: {len(task.questions)} questions of {task.source}, --think {options.think}\n")
    titles = {name: _TITLES.get(name, f"majority of samples ({name})") for name in means}
    width = max(map(len, titles.values()))
    for name, mean in means.items():
        print(f"{titles[name]:<{width}}  {mean.value:6.2%} ± {mean.error:.2%}")
    if probability.cropped:
        lost = int(probability.values.isnan().sum())
        print(
            f"\n{probability.cropped} questions were cropped to {probability.max_length} tokens at a random place; of "
            f"{lost} of them nothing was left of the answer, and they are left out of its probability"
        )


def _progress(what: str) -> Callable[[Iterable], Iterable]:
    return partial(tqdm, desc=what, unit="batch")


def _parser() -> argparse.ArgumentParser:
    parser = SuggestingParser(
        prog="quietstar evaluate",
        description="Measure how well a model answers questions, without examples: the probability of the right answer "
        "as in the paper, exact match of a generated answer, and the majority of several answers.",
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a Quiet-STaR checkpoint")
    parser.add_argument(
        "--task", required=True, choices=TASKS, help="gsm8k, commonsense_qa, or qa for your own questions in --data"
    )
    parser.add_argument(
        "--data", metavar="FILE|NAME",
        help="JSON Lines with the columns question and answer (commonsense_qa: question, choices, answerKey), or the "
        "name of a dataset (default: the task's own, from the hub)",
    )  # fmt: skip
    parser.add_argument(
        "--think", type=number_or("always never learned", float), default="always", metavar="WHEN",
        help="when to think: always, never, a threshold in nats (only where the base prediction has more entropy), or "
        "learned (only where the model's gain head expects more than --gain_threshold)",
    )  # fmt: skip
    add_gain_threshold(parser)
    parser.add_argument(
        "--samples", type=int, metavar="N",
        help="also take the majority of N answers, each after reasoning (\"Let's think step by step\"), at temperature "
        "0.7",
    )  # fmt: skip
    parser.add_argument(
        "--max_new_tokens", type=int, default=384, help="at most this many tokens of reasoning (default: %(default)s)"
    )
    parser.add_argument(
        "--draft_length", type=number_or("auto", int), metavar="N", help="draft N tokens at a time, for speed; or auto"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--batch_size", type=int, default=8, help="questions at a time (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of thoughts, samples and cropping (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="FILE", help="write all numbers and answers to this file, as JSON")
    parser.add_argument("--overwrite", action="store_true", help="overwrite an existing output file")
    return parser
