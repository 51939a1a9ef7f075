"""Generated answers: greedy ones without reasoning, or the majority of several chains of thought."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from quietstar._numbers import SEED, Interval
from quietstar.evaluation.held_out import evaluating
from quietstar.evaluation.predictions import Think, batches, padded
from quietstar.evaluation.tasks import Task, answer_ids
from quietstar.models import QuietStarForCausalLM

logger = logging.get_logger(__name__)

TEMPERATURE = 0.7
_ANOTHER_QUESTION = ("Q:", "\n\n\n")


def greedy_answers(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    think: Think = "always",
    draft_length: int | Literal["auto"] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[str | None]:
    """Generate greedy answers without reasoning, one str per question; None if the text contains no answer.

    Questions longer than the model's positions lose their beginning, with a warning.

    Args:
        model: the model; in evaluation mode during the call.
        tokenizer: the model's tokenizer.
        task: from ``load_task``.
        think, draft_length: as in ``generate``.
        batch_size: questions at a time.
        seed: seed of the thoughts. The state of the random number generators is restored.
        progress: wraps the batches, to show progress.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    speaker = _Speaker(model, tokenizer, batch_size, progress, {"think": think, "draft_length": draft_length})
    length = _answer_length(tokenizer, task)
    SEED.check("seed", seed)
    with evaluating(model, seed):
        said = speaker.continued([question.prompt for question in task.questions], length)
    return [task.extract(text) for text in said]


def sampled_answers(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    samples: int,
    *,
    max_new_tokens: int = 384,
    think: Think = "always",
    draft_length: int | Literal["auto"] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[list[str | None]]:
    """Sample ``samples`` answers to every question, each after its own reasoning, at temperature 0.7.

    The model is prompted with "Let's think step by step.", reasons until it starts another question at the latest, and
    is then prompted for the answer (zero-shot chains of thought, arXiv 2205.11916). Questions of the task ``qa`` are
    answered without reasoning. Other arguments are those of ``greedy_answers``.

    Args:
        samples: number of answers, at least one.
        max_new_tokens: largest number of tokens of reasoning.

    Raises:
        TypeError, ValueError: as in ``greedy_answers``.
    """
    Interval(int, "[1, inf)").check("samples", samples)
    Interval(int, "[1, inf)").check("max_new_tokens", max_new_tokens)
    options = {"think": think, "draft_length": draft_length}
    options |= {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0}
    speaker = _Speaker(model, tokenizer, batch_size, progress, options)
    prompts = [question.prompt for question in task.questions for _ in range(samples)]
    length = _answer_length(tokenizer, task)
    SEED.check("seed", seed)
    with evaluating(model, seed):
        if task.reason_cue is not None:
            prompts = [prompt + task.reason_cue for prompt in prompts]
            stops = {"stop_strings": list(_ANOTHER_QUESTION), "tokenizer": tokenizer}
            reasons = speaker.continued(prompts, max_new_tokens, **stops)
            prompts = [
                prompt + _before_another_question(reason).rstrip() + task.answer_cue
                for prompt, reason in zip(prompts, reasons, strict=True)
            ]
        answers = [task.extract(text) for text in speaker.continued(prompts, length)]
    return [answers[start : start + samples] for start in range(0, len(answers), samples)]


def majority(answers: list[str | None]) -> str | None:
    """Return the most frequent answer, the first of several; None is not counted."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def _answer_length(tokenizer: PreTrainedTokenizerBase, task: Task) -> int:
    if task.answer_tokens is not None:
        return task.answer_tokens
    return max(len(answer_ids(tokenizer, question)[1]) for question in task.questions)


def _before_another_question(text: str) -> str:
    return text[: min((place for end in _ANOTHER_QUESTION if (place := text.find(end)) >= 0), default=None)]


class _Speaker:
    """Continues texts in batches of similar length."""

    def __init__(
        self,
        model: QuietStarForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        progress: Callable[[Iterable], Iterable],
        options: dict[str, object],
    ):
        Interval(int, "[1, inf)").check("batch_size", batch_size)
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.batch_size, self.progress = batch_size, progress
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        pads = tokenizer.pad_token_id, tokenizer.eos_token_id, 0
        self.pad = next(token for token in pads if token is not None)

    def continued(self, prompts: list[str], new_tokens: int, **options: object) -> list[str]:
        """Generate up to ``new_tokens`` tokens after every prompt, as text."""
        rows = self._fitting(self.tokenizer(prompts)["input_ids"], new_tokens)
        said = [""] * len(rows)
        for batch in self.progress(batches([len(row) for row in rows], self.batch_size)):
            input_ids, mask = padded([rows[i] for i in batch], self.model.device, left=True)
            output = self.model.generate(
                input_ids, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=self.pad,
                **{"do_sample": False} | self.options | options,
            )  # fmt: skip
            for i, new in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True):
                end = next((place for place, token in enumerate(new) if token in self.ends), None)
                said[i] = self.tokenizer.decode(new[:end], skip_special_tokens=True)
        return said

    def _fitting(self, rows: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Crop prompts so that new tokens fit into the model's positions."""
        positions = self.model.config.max_position_embeddings
        if new_tokens >= positions:
            raise ValueError(
                f"max_new_tokens must be less than max_position_embeddings = {positions}, got {new_tokens}"
            )
        room = positions - new_tokens
        if cut := sum(len(row) > room for row in rows):
            logger.warning(
                f"{cut} of {len(rows)} prompts are cut to their last {room} tokens, so that {new_tokens} more fit "
                f"within the {positions} positions of the model"
            )
        return [row[-room:] for row in rows]
