"""The paper's accuracy: how probable the right answers are among what answers are made of.

Of every token of the right answer, the probability renormalised over the task's valid tokens (digits or letters, and
the newline that ends the answer); per question the product, then the mean over questions. All tokens are predicted
behind the right ones, in one pass. Tokens of an answer that are not valid (the space in front, the comma of "1,000",
the sign, the decimal point) are passed over: by this measure "-5" is as good as "5". Of the authors' tokenizer these
are the ids their code names.
"""

import random
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar._numbers import SEED, Interval
from quietstar.evaluation.held_out import evaluating
from quietstar.evaluation.predictions import Think, batches, next_token_logits, padded
from quietstar.evaluation.tasks import Question, Task, answer_ids
from quietstar.models import QuietStarForCausalLM
from quietstar.models.speculation import Thinking

MAX_LENGTH = 256


class AnswerProbabilities(NamedTuple):
    """Of the right answers to Q questions."""

    values: Tensor  # float64 [Q]; NaN where cropping has left nothing of the answer
    cropped: int  # questions that were longer than ``max_length``
    max_length: int  # or the model's positions, where these are fewer
    valid_tokens: list[int]  # over which probabilities are renormalised


class _Row(NamedTuple):
    """A question as tokens, and which of them are counted; never the first."""

    tokens: list[int]
    counted: list[int]


def answer_probabilities(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    think: Think = "always",
    batch_size: int = 8,
    seed: int = 0,
    max_length: int = MAX_LENGTH,
    progress: Callable[[Iterable], Iterable] = iter,
) -> AnswerProbabilities:
    """The probability of every right answer, as arXiv 2403.09629 and its code measure it.

    Args:
        model: put into evaluation mode while this runs.
        tokenizer: of the model.
        task: from ``load_task``.
        think: ``"always"``, as in the paper, one thought behind every token; ``"never"``: of the base prediction; or a
            threshold in nats, as for ``generate``.
        batch_size: questions per forward pass; thoughts are drawn differently for another one.
        seed: of cropping and thoughts; the state of the random number generators is left as it was.
        max_length: longer texts are cropped to as many tokens, from a random place on; no more than the model's
            positions. What is cut off of an answer is not counted.
        progress: wraps the batches, to show progress.

    Raises:
        TypeError, ValueError: a bad argument, named; an answer with tokens that are not valid.
    """
    Thinking(think=think)
    Interval(int, "[1, inf)").check("batch_size", batch_size)
    SEED.check("seed", seed)
    positions = model.config.max_position_embeddings
    Interval(int, "[2, inf)").check("max_length", max_length)
    max_length, draw = min(max_length, positions), random.Random(seed)
    valid = task.valid_tokens(tokenizer)
    whole = [_row(tokenizer, task, question, valid) for question in task.questions]
    rows = [_cropped(row, max_length, draw) for row in whole]
    valid = sorted(valid)
    values = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    kept = [i for i, row in enumerate(rows) if row.counted]
    with evaluating(model, seed):
        for batch in progress(batches([len(rows[i].tokens) for i in kept], batch_size)):
            chosen = [kept[i] for i in batch]
            values[chosen] = _probabilities(model, [rows[i] for i in chosen], valid, think)
    return AnswerProbabilities(values, sum(len(row.tokens) > max_length for row in whole), max_length, valid)


def _row(tokenizer: PreTrainedTokenizerBase, task: Task, question: Question, valid: set[int]) -> _Row:
    prompt, answer = answer_ids(tokenizer, question)
    counted = [token in valid for token in answer]
    texts = tokenizer.convert_ids_to_tokens(answer)
    wrong = [text for text, good in zip(texts, counted, strict=True) if not good and not task.may_skip(text)]
    if wrong or not any(counted):
        raise ValueError(
            f"answer must be made of valid tokens, got {', '.join(map(repr, wrong)) or 'none'} in "
            f"{question.continuation!r} of {question.place}: this tokenizer cannot express the task {task.name}"
        )
    start = len(prompt)
    return _Row(prompt + answer, [start + i for i, good in enumerate(counted) if good and start + i > 0])


def _cropped(row: _Row, max_length: int, draw: random.Random) -> _Row:
    if len(row.tokens) <= max_length:
        return row
    start = draw.randint(0, len(row.tokens) - max_length)
    counted = [place - start for place in row.counted if 0 < place - start < max_length]
    return _Row(row.tokens[start : start + max_length], counted)


def _probabilities(model: QuietStarForCausalLM, rows: list[_Row], valid: list[int], think: Think) -> Tensor:
    """Of the counted tokens of each row together, float64 [rows]."""
    input_ids, _ = padded([row.tokens for row in rows], model.device)
    wanted = sorted({place - 1 for row in rows for place in row.counted})
    logits = next_token_logits(model, input_ids, torch.tensor(wanted, device=model.device), think)
    logprobs = logits[..., valid].double().log_softmax(dim=-1).cpu()
    column, number = ({value: i for i, value in enumerate(values)} for values in (wanted, valid))
    return torch.stack(
        [
            logprobs[b, [column[p - 1] for p in row.counted], [number[row.tokens[p]] for p in row.counted]].sum().exp()
            for b, row in enumerate(rows)
        ]
    )
