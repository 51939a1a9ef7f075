"""The rounds of STaR: generate rationales, keep those with right answers, and train the base model on them."""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from tempfile import gettempdir
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from quietstar._numbers import SEED, Interval, check_numbers
from quietstar.evaluation import Task, token_mean
from quietstar.evaluation.predictions import padded
from quietstar.models import QuietStarConfig
from quietstar.models.adapters import is_adapter
from quietstar.models.documents import IGNORE_INDEX
from quietstar.models.export import check_new
from quietstar.star.prompts import Example, Format, Problem, problems_of
from quietstar.star.rationales import Rationale, Writer

_COUNT = Interval(int, "[1, inf)")
_INTERVALS = {
    **dict.fromkeys(("rounds", "steps", "batch_size", "gradient_accumulation_steps", "max_new_tokens"), _COUNT),
    "growth": Interval(float, "[1, inf)"),
    "learning_rate": Interval(float, "(0, inf)"),
    "warmup_steps": Interval(int, "[0, inf)"),
    "temperature": Interval(float, "[0, inf)"),
    "seed": SEED,
}


class NothingRightError(ValueError):
    """Raised if no rationale of a round led to a right answer, so that there is nothing to learn."""


@dataclass(frozen=True)
class Settings:
    """Settings of STaR. The defaults of steps, growth, texts per step and learning rate are the authors'.

    Args:
        rounds: number of rounds of writing rationales and learning from them.
        steps: optimizer steps in the first round; each later round has ``growth`` times as many.
        learning_rate: constant after ``warmup_steps``, during which it rises linearly.
        batch_size: questions or texts at a time; a step has ``gradient_accumulation_steps`` times as many.
        max_new_tokens: largest number of tokens of rationale and answer together.
        temperature: sampling temperature of the rationales to learn from; 0 is greedy.
        rationalise: whether to retry with the answer as a hint if the answer was wrong.
        examples: whether to show the worked examples in every round (``"always"``) or only in the ``"first"``.
        seed: seed of samples and of the order of texts.

    Raises:
        TypeError, ValueError: a value is invalid; the message names it.
    """

    rounds: int = 10
    steps: int = 40
    growth: float = 1.2
    learning_rate: float = 1e-6
    warmup_steps: int = 100
    batch_size: int = 8
    gradient_accumulation_steps: int = 10
    max_new_tokens: int = 256
    temperature: float = 0.0
    rationalise: bool = True
    examples: Literal["always", "first"] = "always"
    seed: int = 0

    def __post_init__(self):
        check_numbers(_INTERVALS, vars(self))
        if self.examples not in ("always", "first"):
            raise ValueError(f"examples must be 'always' or 'first', got {self.examples!r}")

    def steps_of(self, number: int) -> int:
        """Return the number of optimizer steps in a round, counted from 1."""
        return int(self.steps * self.growth ** (number - 1))


class Kept(NamedTuple):
    """A rationale that led to the right answer."""

    problem: Problem
    rationale: Rationale
    rationalised: bool  # written with the answer as a hint


def star(
    base: str | PathLike,
    task: Task,
    examples: Sequence[Example],
    folder: str | PathLike,
    *,
    held_out: Task | None = None,
    form: Format | None = None,
    settings: Settings | None = None,
    dtype: str = "float32",
    progress: Callable[[Iterable, str], Iterable] = lambda batches, title: batches,
    report: Callable[[dict], None] = lambda results: None,
) -> dict[str, object]:
    """Run STaR (arXiv 2203.14465, algorithm 1): in every round, the base is trained on rationales with right answers.

    After every round the folder holds its model (``model/``), the kept rationales (``rationales/round-1.jsonl``, ...)
    and ``results.json``.

    Args:
        base: folder or hub name of a causal language model.
        task: questions to learn from, from ``load_task``.
        examples: worked examples, from ``read_examples``.
        folder: output folder, new or empty.
        held_out: questions on which to measure the greedy accuracy of the base and of every round's model. The worked
            examples are shown if the next round would show them.
        form: format of questions, rationales and answers. Default: ``Format()``.
        settings: default: ``Settings()``.
        dtype: dtype of the weights. In bfloat16, such a small learning rate may change nothing.
        progress: wraps batches, with a title, to show progress.
        report: called with the results after measuring the base and after every round.

    Returns:
        The content of ``results.json``: the settings, ``base_accuracy`` on held-out questions (None without them), and
        per round the share of questions answered right without hints, ``right``, and with hints,
        ``right_with_rationalisation``, how many of both were ``kept``, the ``steps`` and ``loss`` of the training, the
        ``accuracy`` with its standard error, and ``seconds``.

    Raises:
        ValueError: the folder is not empty, the model cannot be loaded, or prompts do not fit it.
        NothingRightError: a round has no right answer.
        FloatingPointError: the loss of a training was not finite.
    """
    form, settings, folder = form or Format(), settings or Settings(), check_new("folder", folder)
    start, tokenizer, model = time.perf_counter(), _load_tokenizer(base), _load(base, dtype)
    writer = Writer(
        tokenizer, form, examples, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
        temperature=settings.temperature, progress=progress,
    )  # fmt: skip
    problems = problems_of(task, form)
    writer.check(model, problems, settings.rationalise)
    measured = [] if held_out is None else problems_of(held_out, form)
    if held_out is not None:
        writer.check(model, measured, hints=False)

    def accuracy(number: int) -> dict[str, float | None]:
        if held_out is None:
            return {"accuracy": None, "accuracy_error": None}
        shown = number == 0 or settings.examples == "always"
        written = writer.write(model, measured, held_out, "held-out questions", examples=shown, greedy=True)
        return _accuracy(measured, written)

    results: dict[str, object] = {"base": str(base), "task": task.name, "data": task.source}
    results |= {"format": asdict(form), "settings": asdict(settings)}
    results |= {"questions": len(problems), "held_out_questions": len(measured)}
    results |= {f"base_{name}": value for name, value in accuracy(0).items()} | {"rounds": []}
    report(results)
    for number in range(1, settings.rounds + 1):
        began, seed = time.perf_counter(), (settings.seed + number) % 2**32
        set_seed(seed)
        kept = _write_round(writer, model, problems, task, number, settings)
        model = None  # frees memory, since two models may not fit
        model = _load(base, dtype)
        steps = settings.steps_of(number)
        loss = _train(model, [writer.training_row(*each[:2]) for each in kept], steps, seed, settings)
        first = sum(not each.rationalised for each in kept)
        done = {
            "round": number,
            "right": first / len(problems),
            "right_with_rationalisation": len(kept) / len(problems),
        }
        done |= {"kept": len(kept), "steps": steps, "loss": loss} | accuracy(number)
        results["rounds"].append(done | {"seconds": time.perf_counter() - began})
        results["seconds"] = time.perf_counter() - start
        _save(folder, model, tokenizer, number, kept, form, results)
        report(results)
    return results


def _write_round(
    writer: Writer, model: PreTrainedModel, problems: list[Problem], task: Task, number: int, settings: Settings
) -> list[Kept]:
    """Return the rationales that a round learns from: first those with right answers, then those right with a hint."""
    shown = number == 1 or settings.examples == "always"
    kept, wrong = _sorted(problems, writer.write(model, problems, task, f"round {number}, rationales", examples=shown))
    if settings.rationalise and wrong:
        title = f"round {number}, with hints"
        again = writer.write(model, wrong, task, title, hints=True, examples=shown)
        kept += [each._replace(rationalised=True) for each in _sorted(wrong, again)[0]]
    if not kept:
        hinted = ", not even with the answer as a hint," if settings.rationalise else ""
        raise NothingRightError(
            f"round {number} must have a rationale that leads to the right answer, got none for {len(problems)} "
            f"questions{hinted} so that there is nothing to learn: the model, the examples or max_new_tokens = "
            f"{settings.max_new_tokens} may not do"
        )
    return kept


def _sorted(problems: list[Problem], written: list[Rationale]) -> tuple[list[Kept], list[Problem]]:
    """Return the rationales with right answers, and the problems of the others."""
    pairs = list(zip(problems, written, strict=True))
    right = [Kept(problem, rationale, False) for problem, rationale in pairs if rationale.answer == problem.answer]
    return right, [problem for problem, rationale in pairs if rationale.answer != problem.answer]


def _accuracy(problems: list[Problem], written: list[Rationale]) -> dict[str, float | None]:
    right = [[rationale.answer == problem.answer] for problem, rationale in zip(problems, written, strict=True)]
    mean = token_mean(torch.tensor(right, dtype=torch.float64))
    return {"accuracy": mean.value, "accuracy_error": mean.error if len(right) > 1 else None}


def _train(
    model: PreTrainedModel, rows: list[tuple[list[int], int]], steps: int, seed: int, settings: Settings
) -> float:  # fmt: skip
    """Train a model in place on texts, given with the lengths of their questions (no loss); returns the mean loss."""
    arguments = TrainingArguments(
        output_dir=gettempdir(),  # nothing is saved
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        weight_decay=0.0,
        logging_strategy="no",
        logging_nan_inf_filter=False,  # the filter would hide such losses from the mean
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        seed=seed,
    )
    if arguments.n_gpu > 1:  # the Trainer would use torch.nn.DataParallel, with a larger batch
        raise ValueError(f"there must be one GPU at most, got {arguments.n_gpu}: choose by CUDA_VISIBLE_DEVICES=0")
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    loss = trainer.train().training_loss
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss must be finite, got {loss} within {steps} steps: a lower learning rate?")
    return loss


def collate(rows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    """Collate a batch of texts, padded on the right, with labels after their questions; int64 [B, L]."""
    input_ids, mask = padded([tokens for tokens, _ in rows], torch.device("cpu"))
    questions = torch.tensor([length for _, length in rows])
    unlearnt = (mask == 0) | (torch.arange(input_ids.shape[1]) < questions[:, None])
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(unlearnt, IGNORE_INDEX)}


def _load_tokenizer(base: str | PathLike) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer of {base}: {error}") from error


def _load(base: str | PathLike, dtype: str) -> PreTrainedModel:
    """Load a causal language model without thoughts, on the GPU if there is one."""
    if is_adapter(base):
        raise ValueError(f"model must be a checkpoint, got an adapter in {base}: merge it first")
    try:
        config = AutoConfig.from_pretrained(base)
        if config.model_type == QuietStarConfig.model_type or hasattr(config, "max_thoughts"):
            raise ValueError("a Quiet-STaR model, which has thoughts already; `quietstar export` writes its base model")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model must be a causal language model, got {base}: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _save(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, number: int, kept: list[Kept],
    form: Format, results: dict,
) -> None:  # fmt: skip
    (folder / "rationales").mkdir(parents=True, exist_ok=True)
    with (folder / "rationales" / f"round-{number}.jsonl").open("w", encoding="utf-8") as lines:
        for problem, rationale, rationalised in kept:
            row = {"question": problem.question, "rationale": form.split(rationale.text)[0], "answer": problem.answer}
            lines.write(json.dumps(row | {"rationalised": rationalised}, ensure_ascii=False) + "\n")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
