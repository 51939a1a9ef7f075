"""The decoding loop behind the options of ``generate``: drafting, thinking where it is wanted, rows of unequal pace."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from quietstar.models.attention import TextCache, ThoughtStates
from quietstar.models.generation_output import QuietStarGenerateOutput, ThoughtStreamer, token_steps
from quietstar.models.padding import first_key
from quietstar.models.speculation import DraftLength, Thinking, verify
from quietstar.models.thoughts import run_layers

if TYPE_CHECKING:
    from quietstar.models.modeling import QuietStarForCausalLM


def decode(
    model: "QuietStarForCausalLM",
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    *,
    thinking: Thinking,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **_,
) -> Tensor | QuietStarGenerateOutput:
    """What transformers calls in place of its own loop, with the arguments it prepares for that.

    Raises:
        ValueError: something this loop does not do is asked for.
    """
    refused = {
        name: getattr(generation_config, name)
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    }
    refused |= {"guidance_scale": generation_config.guidance_scale not in (None, 1), "synced_gpus": synced_gpus}
    if any(refused.values()):
        names = ", ".join(name for name, value in refused.items() if value)
        raise ValueError(f"{names} must be left out with draft_length, think or return_thoughts")
    if isinstance(streamer, ThoughtStreamer) and len(input_ids) > 1:
        raise ValueError(f"streamer must be given one sequence, got {len(input_ids)}")
    loop = _Loop(model, input_ids, attention_mask, position_ids, generation_config, thinking)
    loop.processors, loop.criteria, loop.streamer = logits_processor, stopping_criteria, streamer
    output = loop.run()
    if streamer is not None:
        streamer.end()
    return output if thinking.return_thoughts or generation_config.return_dict_in_generate else output.sequences


class _Loop:
    """The state of one call. Column j of ``ids`` and key j of the cache belong together.

    Rows grow at their own pace: ``lengths`` holds where each ends, on the host. What stands behind is left over from
    rejected drafts and never read. Rows that have stopped are computed on but grow no more.
    """

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    streamer: BaseStreamer | None

    def __init__(
        self,
        model: "QuietStarForCausalLM",
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        generation_config: GenerationConfig,
        thinking: Thinking,
    ):
        batch, prompt = input_ids.shape
        device = model.device
        self.model, self.thinking = model, thinking
        self.draft_length = DraftLength(thinking.draft_length, model.config.thought_length)
        self.prompt_length, self.max_length = prompt, generation_config.max_length
        self.do_sample = generation_config.do_sample
        pad = generation_config._pad_token_tensor  # prepared by transformers: without one the end of text
        self.pad = 0 if pad is None else int(pad)

        capacity = self.max_length + self.draft_length.longest + 1  # stopped rows are computed on
        self.ids = torch.full((batch, capacity), self.pad, device=device)
        self.ids[:, :prompt] = input_ids
        if position_ids is None:
            position_ids = torch.arange(prompt)[None]
        behind = position_ids[:, -1:] + torch.arange(1, capacity - prompt + 1, device=position_ids.device)
        self.position_ids = torch.cat([position_ids, behind], dim=1).to(device).expand(batch, -1)
        self.attention_mask = None if attention_mask is None else attention_mask.to(device)
        self.key_start = first_key(self.attention_mask, (batch, prompt))

        self.cache = TextCache(capacity, self.key_start, model.config.sliding_window)
        self.thought_states = ThoughtStates(self.draft_length.longest + 1)
        self.lengths, self.stopped = [prompt] * batch, [False] * batch
        self.streamed = prompt

        # Of every new token. Only what is asked for is kept.
        new = batch, capacity - prompt
        self.thinks = torch.zeros(new, dtype=torch.bool, device=device)
        self.details: list[Tensor] = []
        if thinking.return_thoughts:
            thoughts = torch.full((*new, model.config.thought_length), -1, device=device)
            self.details = [thoughts, *torch.zeros(3, *new, device=device).unbind()]

    def run(self) -> QuietStarGenerateOutput:
        """Prefill, then rounds of drafting and thinking until every row has stopped."""
        hidden = self._prefill()
        while True:
            left = self.max_length - min(n for n, done in zip(self.lengths, self.stopped, strict=True) if not done)
            self._round(hidden, min(self.draft_length(), left - 1))
            self._stream()
            if all(self.stopped):
                return self._output()
            last = [length - 1 for length in self.lengths]
            hidden = self._base_step(self.ids.gather(1, self._column(last)), last)

    def _prefill(self) -> Tensor:
        """Hidden state [B, H] of the base model behind the prompts."""
        model, prompt = self.model, self.prompt_length
        text = model.model.embed_tokens(self.ids[:, :prompt])
        mask = model._base_mask(text, self.attention_mask, self.key_start)
        columns = torch.arange(prompt, device=text.device).expand(len(text), -1)
        return run_layers(
            model.model, text, self.position_ids[:, :prompt], self.cache.extend(columns, prompt, mask)
        )[:, -1]  # fmt: skip

    def _base_step(self, tokens: Tensor, columns: list[int]) -> Tensor:
        """Hidden state [B, H] of the base model behind ``tokens`` [B, 1], one per row, standing at ``columns``."""
        column, end = self._column(columns), max(columns) + 1
        window = self.cache.window
        everything = self.key_start is None and min(columns) + 1 == end and (window is None or end <= window)
        cache = self.cache.extend(column, end, None if everything else self.cache.visible(column, end))
        embeddings = self.model.model.embed_tokens(tokens)
        return run_layers(self.model.model, embeddings, self.position_ids.gather(1, column), cache)[:, 0]

    def _round(self, hidden: Tensor, count: int) -> None:
        """Draft ``count`` tokens behind every row, think behind all of them, keep what is agreed on.

        Args:
            hidden: [B, H], base model behind the last token of each row.
            count: drafts, 0 or more.
        """
        states, logits, scores, drafts = [hidden], [], [], []
        for i in range(count + 1):
            logits.append(self._logits(states[i]))
            scores.append(self._process(logits[i], i))
            if i < count:
                drafts.append(self._draw(scores[i]))
                columns = [length + i for length in self.lengths]
                self.ids.scatter_(1, self._column(columns), drafts[i])
                states.append(self._base_step(drafts[i], columns))
        base_logits, base_scores = torch.stack(logits, dim=1), torch.stack(scores, dim=1)

        thinks, logits, thoughts = self._think(torch.stack(states, dim=1), base_logits)
        scores = logits
        if self.processors:
            scores = torch.stack([self._process(x, i) for i, x in enumerate(logits.unbind(1))], dim=1)
        drafted = torch.cat(drafts, dim=1) if drafts else self.ids[:, :0]
        accepted, token = verify(drafted, base_scores, scores, self.do_sample)
        accepted = accepted.tolist()
        self.ids.scatter_(1, self._column([n + m for n, m in zip(self.lengths, accepted, strict=True)]), token[:, None])

        before = self.lengths
        self.draft_length.learn([m for m, done in zip(accepted, self.stopped, strict=True) if not done], count)
        self._grow(accepted)
        self._remember(before, thinks, base_logits, logits, thoughts)

    def _think(self, hidden: Tensor, base_logits: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Think behind the positions that are worth it.

        Args:
            hidden: [B, P, H], the base model behind the last token of each row and behind its drafts.
            base_logits: [B, P, V], its predictions.

        Returns:
            bool [B, P], whether it thought; the predictions [B, P, V], those of the base model where it did not; the
            thoughts [B, P, k] and their weights [B, P], −1 and 0 where it did not, None where it nowhere did.
        """
        model, device = self.model, hidden.device
        batch, positions, _ = hidden.shape
        thinks = ~torch.tensor(self.stopped, device=device)[:, None].expand(-1, positions)
        if self.thinking.think == "never":
            thinks = torch.zeros_like(thinks)
        elif self.thinking.think != "always":
            entropy = torch.special.entr(base_logits.softmax(dim=-1)).sum(dim=-1)
            thinks = thinks & (entropy > self.thinking.think)
        most = int(thinks.sum(dim=1).max())
        if most == 0:
            return thinks, base_logits, None

        # The chosen positions of each row, moved to the front; rows that have fewer are filled up with inactive ones.
        row = torch.arange(batch, device=device)[:, None]
        chosen = thinks.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        active = thinks[row, chosen]
        anchors = torch.where(active, self._column(self.lengths) - 1 + chosen, -1)
        thinker = model._thinker(self.cache, anchors, self.position_ids, 0, self.key_start, self.thought_states)
        tokens = thinker.sample(model.config.thought_temperature, model.config.thought_token_ids, None)
        thought_hidden = thinker.finish(tokens)
        base_hidden = hidden[row, chosen]
        weight = model.mixing_head(base_hidden, thought_hidden)
        mixed = self._logits(torch.lerp(base_hidden, thought_hidden, weight[..., None]))
        logits = base_logits.clone()
        logits[row, chosen] = torch.where(active[..., None], mixed, logits[row, chosen])
        thoughts = torch.full((batch, positions, tokens.shape[-1]), -1, device=device)
        thoughts[row, chosen] = tokens.masked_fill(~active[..., None], -1)
        weights = torch.zeros(batch, positions, device=device)
        weights[row, chosen] = weight.float().masked_fill(~active, 0)
        return thinks, logits, (thoughts, weights)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in float32 as transformers' loops take them; the thought tokens are never text."""
        logits = self.model.lm_head(hidden).float()
        logits[..., list(self.model.config.thought_token_ids)] = -torch.inf
        return logits

    def _process(self, logits: Tensor, ahead: int) -> Tensor:
        """Logits [B, V] of the tokens ``ahead`` columns behind the end of each row, through the logits processors.

        Processors take a batch of one length: they are called for every length there is, with all rows, since some of
        them go by the row's number.
        """
        if not self.processors:
            return logits
        scores = torch.empty_like(logits)
        for length in set(self.lengths):
            rows = [b for b, own in enumerate(self.lengths) if own == length]
            scores[rows] = self.processors(self.ids[:, : length + ahead], logits.clone())[rows]
        return scores

    def _draw(self, scores: Tensor) -> Tensor:
        """A token [B, 1] from scores [B, V]."""
        if self.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), 1)
        return scores.argmax(dim=-1, keepdim=True)

    def _grow(self, accepted: list[int]) -> None:
        """Take in the accepted drafts and one token more, up to where a stopping criterion holds."""
        lengths, stopped = list(self.lengths), list(self.stopped)
        target = [n if done else n + m + 1 for n, m, done in zip(lengths, accepted, stopped, strict=True)]
        for length in range(min(lengths) + 1, max(target) + 1):
            growing = [b for b, own in enumerate(lengths) if own == length - 1 < target[b] and not stopped[b]]
            if growing:
                stop = self.criteria(self.ids[:, :length], None).tolist()
            for b in growing:
                lengths[b], stopped[b] = length, stop[b]
        self.lengths, self.stopped = lengths, stopped

    def _remember(
        self,
        before: list[int],
        thinks: Tensor,
        base_logits: Tensor,
        logits: Tensor,
        thoughts: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Keep what is known of the tokens that rows grew by since ``before``; tensors are of the round's positions."""
        grown = [
            (b, i, start + i)
            for b, (start, end) in enumerate(zip(before, self.lengths, strict=True))
            for i in range(end - start)
        ]
        row, ahead, column = torch.tensor(grown, device=self.ids.device).unbind(1)
        new = column - self.prompt_length
        self.thinks[row, new] = thinks[row, ahead]
        if not self.details:
            return
        if thoughts is not None:
            for kept, known in zip(self.details[:2], thoughts, strict=True):
                kept[row, new] = known[row, ahead]
        token = self.ids[row, column, None]
        for kept, predictions in zip(self.details[2:], (base_logits, logits), strict=True):
            kept[row, new] = predictions[row, ahead].log_softmax(dim=-1).gather(-1, token)[:, 0]

    def _stream(self) -> None:
        """Hand on the columns that are certain in every row."""
        if self.streamer is None:
            return
        growing = [n for n, done in zip(self.lengths, self.stopped, strict=True) if not done]
        certain = min(growing, default=max(self.lengths))
        if isinstance(self.streamer, ThoughtStreamer):
            new = slice(self.streamed - self.prompt_length, certain - self.prompt_length)
            columns = self.ids[:, self.prompt_length :], self.thinks, *self.details
            for step in token_steps(*(column[0, new] for column in columns)):
                self.streamer.put_step(step)
        else:
            for column in self._text(certain)[:, self.streamed :].unbind(1):
                self.streamer.put(column.cpu())
        self.streamed = certain

    def _text(self, width: int) -> Tensor:
        """The first columns of all rows, int64 [B, width], padded behind the end of rows that have stopped."""
        behind = torch.arange(width, device=self.ids.device) >= self._column(self.lengths)
        return self.ids[:, :width].masked_fill(behind, self.pad)

    def _output(self) -> QuietStarGenerateOutput:
        new = max(self.lengths) - self.prompt_length
        details = [detail[:, :new] for detail in self.details] or [None] * 4
        return QuietStarGenerateOutput(
            self._text(max(self.lengths)),
            torch.tensor([length - self.prompt_length for length in self.lengths]),
            self.thinks[:, :new],
            *details,
            drafted=self.draft_length.drafted,
            accepted=self.draft_length.accepted,
        )

    def _column(self, numbers: list[int]) -> Tensor:
        """Numbers of the rows as int64 [B, 1] on the device."""
        return torch.tensor(numbers, device=self.ids.device)[:, None]
