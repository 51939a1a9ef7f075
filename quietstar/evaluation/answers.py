"""The paper's accuracy: the probability of the right answers among valid answer tokens.

The probability of every token of the right answer is renormalised over the task's valid tokens (digits or letters, and
the newline that ends the answer). The measure is the product over these tokens, averaged over questions. All tokens are
predicted in one pass, given the right preceding tokens. Tokens of an answer that are not valid (the leading space, the
comma of "1,000", the sign, the decimal point) are skipped, so "-5" counts as much as "5". For the authors' tokenizer,
the valid tokens are the ids in their code.
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
    """Probabilities of the right answers to Q questions."""

    values: Tensor  # float64 [Q]; NaN if cropping removed the whole answer
    cropped: int  # number of questions longer than ``max_length``
    max_length: int  # or the model's number of positions, if smaller
    valid_tokens: list[int]  # tokens over which probabilities are renormalised


class _Row(NamedTuple):
    """A question as tokens, and which of them count (never the first)."""

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
    """Compute the probability of every right answer, as measured by arXiv 2403.09629 and its code.

    Args:
        model: the model; in evaluation mode during the call.
        tokenizer: the model's tokenizer.
        task: from ``load_task``.
        think: ``"always"``, as in the paper: one thought after every token; ``"never"``: the base prediction; or a
            threshold in nats, as in ``generate``.
        batch_size: questions per forward pass. Another batch size leads to other thoughts.
        seed: seed of cropping and thoughts. The state of the random number generators is restored.
        max_length: longer texts are cropped to this many tokens (or to the model's number of positions, if smaller),
            starting at a random place. Parts of an answer that are cropped do not count.
        progress: wraps the batches, to show progress.

    Raises:
        TypeError, ValueError: an argument is invalid (the message names it), or an answer has tokens that are not
            valid.
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
    """Compute the joint probability of each row's counted tokens, float64 [rows]."""
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
