"""Generation of rationales by the model, with the answers that they lead to."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from quietstar.evaluation import Task
from quietstar.evaluation.predictions import batches, padded
from quietstar.star.prompts import Example, Format, Problem


class Rationale(NamedTuple):
    """The text that a model wrote after a question."""

    tokens: list[int]  # up to and including the stop text, or up to but excluding the end-of-text token
    text: str  # text before the stop text
    answer: str | None  # as the task parses it; None if there is none, or if the text was not finished


class Writer:
    """Generates rationales after worked examples, in batches padded on the left.

    Args:
        tokenizer: the models' tokenizer.
        form: format of examples and questions.
        examples: worked examples to put before every question.
        max_new_tokens: largest number of tokens of rationale and answer together; longer texts have no answer.
        batch_size: questions at a time.
        temperature: sampling temperature; 0 is greedy.
        progress: wraps the batches, with a title, to show progress.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        form: Format,
        examples: Sequence[Example],
        *,
        max_new_tokens: int,
        batch_size: int,
        temperature: float = 0.0,
        progress: Callable[[Iterable, str], Iterable] = lambda batches, title: batches,
    ):
        self.tokenizer, self.form, self.examples = tokenizer, form, examples
        self.max_new_tokens, self.batch_size, self.temperature = max_new_tokens, batch_size, temperature
        self.progress = progress
        self.pad = next(x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if x is not None)

    def prompts(self, problems: Sequence[Problem], hints: bool = False, examples: bool = True) -> list[list[int]]:
        """Return the tokens of every question's prompt."""
        shown = self.form.few_shot(self.examples, hints) if examples else ""
        texts = [shown + self.form.prompt(each.question, each.answer if hints else None) for each in problems]
        rows, end = self.tokenizer(texts, verbose=False)["input_ids"] if texts else [], self.tokenizer.eos_token_id
        return [row[:-1] if row[-1:] == [end] else row for row in rows]

    def check(self, model: PreTrainedModel, problems: Sequence[Problem], hints: bool) -> None:
        """Check that the longest prompts and the text to be generated fit the model.

        Raises:
            ValueError: they do not, or the tokenizer is another model's.
        """
        rows = self.prompts(problems, hints)
        if (token := max(map(max, rows))) >= (size := model.get_input_embeddings().num_embeddings):
            raise ValueError(
                f"tokenizer must be that of the model, which has {size} tokens, got one with token {token}"
            )
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(range(len(rows)), key=lambda i: len(rows[i]))
        length = len(rows[longest])
        if most is not None and length + self.max_new_tokens > most:
            shown = len(self.tokenizer(self.form.few_shot(self.examples, hints), verbose=False)["input_ids"])
            raise ValueError(
                f"few_shot must leave room within the model's {most} positions, got {shown} tokens of examples, "
                f"{length - shown} of the question in {problems[longest].place} and max_new_tokens = "
                f"{self.max_new_tokens}"
            )

    def write(
        self, model: PreTrainedModel, problems: Sequence[Problem], task: Task, title: str = "rationales", *,
        hints: bool = False, examples: bool = True, greedy: bool = False,
    ) -> list[Rationale]:  # fmt: skip
        """Generate a rationale for every problem; samples use torch's global generator.

        Args:
            model: the model, which is put into evaluation mode.
            problems: the problems.
            task: parses the answers.
            title: title of the progress.
            hints: whether to give the answers as hints.
            examples: whether to show the worked examples.
            greedy: whether to decode greedily, whatever the temperature.
        """
        rows = self.prompts(problems, hints, examples)
        written: list[Rationale] = [Rationale([], "", None)] * len(rows)
        model.eval()
        chosen = {"do_sample": False}
        if self.temperature > 0 and not greedy:
            chosen = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        for batch in self.progress(batches([len(row) for row in rows], self.batch_size), title):
            input_ids, mask = padded([rows[i] for i in batch], model.device, left=True)
            start = input_ids.shape[1]
            output = model.generate(
                input_ids, attention_mask=mask, max_new_tokens=self.max_new_tokens, pad_token_id=self.pad,
                stopping_criteria=[_Stop(self.tokenizer, self.form.stop, start)], **chosen,
            )  # fmt: skip
            ends = model.generation_config.eos_token_id
            for i, new in zip(batch, output[:, start:].tolist(), strict=True):
                written[i] = self._read(new, ends if isinstance(ends, list) else [ends], task)
        return written

    def training_row(self, problem: Problem, rationale: Rationale) -> tuple[list[int], int]:
        """Return the text to learn, without examples and hint, and the number of its tokens that are the question."""
        (prompt,) = self.prompts([problem], examples=False)
        end = self.tokenizer.eos_token_id
        return prompt + rationale.tokens + ([] if end is None else [end]), len(prompt)

    def _read(self, new: list[int], ends: list[int | None], task: Task) -> Rationale:
        """Parse new tokens, which may continue after the end of the rationale."""
        end = next((place for place, token in enumerate(new) if token in ends), None)
        tokens = new[:end]
        text, stop, _ = self._decode(tokens).partition(self.form.stop)
        if stop:  # cut to the fewest tokens that contain it
            count = bisect_left(range(1, len(tokens)), True, key=lambda n: stop in self._decode(tokens[:n])) + 1
            tokens = tokens[:count]
        parts = self.form.split(text) if stop or end is not None else None
        return Rationale(tokens, text, None if parts is None else task.extract(parts[1]))

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


class _Stop(StoppingCriteria):
    """Stops rows that contain a text; transformers' own criterion requires tokenizers that know every letter."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, start: int):
        self.tokenizer, self.text, self.start = tokenizer, text, start
        self.most = len(text.encode()) + 1  # most tokens that the text can span, and one whose space is stripped

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        newest = input_ids[:, max(self.start, input_ids.shape[1] - self.most) :]
        texts = self.tokenizer.batch_decode(newest, skip_special_tokens=True)
        return torch.tensor([self.text in text for text in texts], device=input_ids.device)
