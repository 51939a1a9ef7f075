"""The model for EleutherAI's harness: ``lm_eval --model quietstar --model_args pretrained=FOLDER,think=always``."""

import logging
from collections import defaultdict
from typing import Literal

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from quietstar._numbers import SEED
from quietstar.evaluation.held_out import evaluating
from quietstar.evaluation.predictions import Think, batches, next_token_logits, padded
from quietstar.models import QuietStarForCausalLM
from quietstar.models.defaults import CHECKS, DEFAULT, choose

logger = logging.getLogger(__name__)


@register_model("quietstar")
class QuietStarLM(HFLM):
    """A Quiet-STaR model for lm-eval, based on lm-eval's Hugging Face model, which documents all other arguments.

    Log-likelihoods are those of the mixed prediction: one thought is sampled before every token that is scored.
    Continuations that differ only in their last token, as the choices of a question often do, are compared after the
    same thoughts.

    Args:
        pretrained: folder or hub name of a Quiet-STaR checkpoint, or a model.
        think: ``"always"``, ``"never"`` (the base prediction), or a threshold in nats, as in ``generate``; also used
            for log-likelihoods. Default: the model's setting.
        draft_length: as in ``generate``; it affects only the speed of generation, not results.
        seed: seed of the thoughts, set at the beginning of every call.
        device: default: the GPU if there is one.
        kwargs: lm-eval's arguments, and fields that override the model's configuration (``thought_temperature``, ...).

    Raises:
        TypeError, ValueError: an argument is invalid (the message names it), or the checkpoint has no thoughts.
    """

    AUTO_MODEL_CLASS = QuietStarForCausalLM

    def __init__(
        self,
        pretrained: str | QuietStarForCausalLM,
        *,
        think: Think | Literal["default"] = DEFAULT,
        draft_length: int | Literal["auto", "default"] | None = DEFAULT,
        seed: int = 0,
        device: str | None = None,
        **kwargs: object,
    ):
        for name, value in (given := {"think": think, "draft_length": draft_length}).items():
            if value != DEFAULT:
                CHECKS[name](value)
        SEED.check("seed", seed)
        if not isinstance(pretrained, str | QuietStarForCausalLM):
            raise TypeError(f"pretrained must be a name or a QuietStarForCausalLM, got {type(pretrained).__name__}")
        if kwargs.get("peft"):
            raise ValueError(f"peft must be left out, got {kwargs['peft']}: merge the adapter into the model")
        self.seed = seed
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, device=device, **kwargs)
        sources = self.model.generation_config, self.model.config
        self.think, self.draft_length = (choose(name, value, *sources) for name, value in given.items())

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with evaluating(self.model, self.seed):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        with evaluating(self.model, self.seed):
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        with evaluating(self.model, self.seed):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:  # fmt: skip
        """Compute log p of continuations of contexts, and whether they are greedy.

        Unlike lm-eval's own method, which predicts after every token of the context, this predicts only scored tokens.
        """
        about = defaultdict(list)  # input tokens -> the requests that they answer
        for number, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"continuations must have 1 to max_length = {self.max_length} tokens, got {len(continuation)}"
                )
            read = (context + continuation)[:-1]
            about[tuple(read[-self.max_length :]), len(read) > self.max_length].append(number)
        texts = list(about)
        if cut := sum(len(about[text]) for text in texts if text[1]):
            logger.warning(f"{cut} of {len(requests)} contexts are cut on the left, to max_length = {self.max_length}")
        size = override_bs or self.batch_size
        if size == "auto":
            size = self._detect_batch_size(sorted(requests, key=lambda request: -len(request[1] + request[2])))
        answers: list = [None] * len(requests)
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="loglikelihoods")
        for batch in batches([len(text) for text, _ in texts], size):
            numbers = [about[texts[i]] for i in batch]
            rows = [list(texts[i][0]) for i in batch]
            lengths = [max(len(requests[n][2]) for n in group) for group in numbers]
            input_ids, _ = padded(rows, self.device)
            wanted = sorted({p for row, n in zip(rows, lengths, strict=True) for p in range(len(row) - n, len(row))})
            logits = self._logits(input_ids, torch.tensor(wanted, device=self.device))
            column = {position: i for i, position in enumerate(wanted)}
            for row, predicted, group in zip(rows, logits, numbers, strict=True):
                for number in group:
                    pair, _, continuation = requests[number]
                    first = column[len(row) - len(continuation)]
                    answers[number] = _scored(predicted[first : first + len(continuation)], continuation)
                    if pair is not None:
                        self.cache_hook.add_partial("loglikelihood", pair, answers[number])
                    progress.update()
        progress.close()
        return answers

    def _logits(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        precision = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
            return next_token_logits(self.model, input_ids, positions, self.think)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Predict after all tokens; lm-eval uses this to find the largest batch size."""
        return self._logits(inps, torch.arange(inps.shape[1], device=inps.device))

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: object) -> Tensor:
        options = {"think": self.think, "draft_length": self.draft_length}
        return super()._model_generate(context, max_length, stop, **generation_kwargs, **options)


def _scored(logits: Tensor, tokens: list[int]) -> tuple[float, bool]:
    """Compute the total log p of tokens from logits [n, V], and whether each is the most likely."""
    tokens = torch.tensor(tokens, device=logits.device)
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
    return float(logprobs.sum()), bool((logits.argmax(dim=-1) == tokens).all())
