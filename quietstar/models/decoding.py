"""The decoding loop behind the options of ``generate``: drafting, thinking where it is wanted, rows of unequal pace."""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from quietstar.models.controls import thoughts_of_call
from quietstar.models.documents import document_starts
from quietstar.models.layouts import TextCache, TextRows, ThoughtStates
from quietstar.models.modeling import ThinkingModel
from quietstar.models.outputs import QuietStarGenerateOutput, ThoughtStreamer, token_steps
from quietstar.models.speculation import DraftLength, Thinking, verify
from quietstar.models.text_rules import TextRules
from quietstar.models.thoughts import Thinker
from quietstar.models.transformers_names import pad_token_id


def decode(
    model: ThinkingModel,
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
    **others,
) -> Tensor | QuietStarGenerateOutput:
    """What transformers calls in place of its own loop, with the arguments it prepares for that.

    Raises:
        ValueError: something this loop does not do is asked for.
    """
    thinking.refuse_others(generation_config, synced_gpus=synced_gpus, **others)
    if isinstance(streamer, ThoughtStreamer) and len(input_ids) > 1:
        raise ValueError(f"streamer must be given one sequence, got {len(input_ids)}")
    with torch.inference_mode():  # calls cost less in it
        loop = _Loop(model, input_ids, attention_mask, position_ids, generation_config, thinking)
        loop.rules, loop.streamer = TextRules(logits_processor, stopping_criteria), streamer
        output = loop.run()
    # Copies, which may be trained on.
    output = type(output)(**{key: x.clone() if isinstance(x, Tensor) else x for key, x in output.items()})
    if streamer is not None:
        streamer.end()
    return output if thinking.return_thoughts or generation_config.return_dict_in_generate else output.sequences


class _Loop:
    """The state of one call. Column j of ``ids`` and key j of the cache belong together.

    With drafts rows grow at their own pace: ``lengths`` holds how far each is, on the host. What stands behind is left
    over from rejected drafts and never read. Rows that have stopped are computed on but grow no more. Without drafts,
    where the rules of the text have a state, or where rows think for each other, all rows are in step, and those that
    have stopped grow by padding. ``ends`` holds where the texts end, without that padding.
    """

    rules: TextRules
    streamer: BaseStreamer | None

    def __init__(
        self,
        model: ThinkingModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        generation_config: GenerationConfig,
        thinking: Thinking,
    ):
        batch, prompt = input_ids.shape
        device = model.device
        self.config, self.predictor, self.thinking = model.config, model.predictor(), thinking
        self.prompt_length, self.max_length = prompt, generation_config.max_length
        self.returned = generation_config.num_return_sequences or 1
        given = thoughts_of_call(thinking.thoughts, batch, self.returned, self.max_length - prompt, model.config)
        self.given = None if given is None else given.to(device)
        self.shuffled = given is None and not thinking.own_thoughts
        self.thought_length = model.config.thought_length if given is None else given.shape[-1]
        self.draft_length = DraftLength(thinking.draft_length, self.thought_length if given is None else 1)
        self.do_sample = generation_config.do_sample
        pad = pad_token_id(generation_config)
        self.pad = 0 if pad is None else pad

        capacity = self.max_length + self.draft_length.longest + 1  # stopped rows are computed on
        self.ids = torch.full((batch, capacity), self.pad, device=device)
        self.ids[:, :prompt] = input_ids
        if position_ids is None:
            position_ids = torch.arange(prompt)[None]
        behind = position_ids[:, -1:] + torch.arange(1, capacity - prompt + 1, device=position_ids.device)
        self.position_ids = torch.cat([position_ids, behind], dim=1).to(device).expand(batch, -1)
        self.attention_mask = None if attention_mask is None else attention_mask.to(device)
        starts = document_starts(self.attention_mask, self.position_ids[:, :prompt], (batch, prompt))
        if starts is not None and starts.dim() == 2:
            raise ValueError("position_ids must go up by one in generate(), got packed documents")
        self.key_start = starts

        self.cache = TextCache(capacity)
        self.thought_states = ThoughtStates(self.draft_length.longest + 1)
        self.lengths, self.ends = [prompt] * batch, [prompt] * batch
        self.stopped = [False] * batch
        self.asked_to_stop = self._where_stopped()
        self.streamed = prompt

        # Of every new token. Only what is asked for is kept.
        new = batch, capacity - prompt
        self.thinks = torch.zeros(new, dtype=torch.bool, device=device)
        self.details: list[Tensor] = []
        if thinking.return_thoughts:
            thoughts = torch.full((*new, self.thought_length), -1, device=device)
            self.details = [thoughts, *torch.zeros(3, *new, device=device).unbind()]

    def run(self) -> QuietStarGenerateOutput:
        """Rounds of drafting and thinking until every row has stopped."""
        while True:
            left = self.max_length - min(n for n, done in zip(self.lengths, self.stopped, strict=True) if not done)
            self._round(min(self.draft_length(), left - 1))
            self._stream()
            if all(self.stopped):
                return self._output()

    def _round(self, count: int) -> None:
        """Draft ``count`` tokens, 0 or more, behind every row, think behind all of them, keep what is agreed on."""
        states, logits, draft_scores, drafts = [], [], [], []
        thinks = ~self._where_stopped()[:, None].expand(-1, count + 1)
        if self.given is not None:
            thinks = thinks & (self._given(torch.arange(count + 1, device=self.ids.device))[..., :1] >= 0).all(dim=-1)
        thinker = None
        for i in range(count + 1):
            if i == count and self.thinking.think == "always":
                thinker = self._thinker(thinks, count + 1)
            states.append(self._read(i, thinker))
            logits.append(self._logits(states[i]))
            if i < count:
                draft_scores.append(self._process(self.rules.for_drafts, logits[i], i))
                drafts.append(self._draw(draft_scores[i]))
                self.ids.scatter_(1, self._column([length + i for length in self.lengths]), drafts[i])
        base_logits = torch.stack(logits, dim=1)

        if thinker is None:
            thinking = self.thinking
            thinks = thinks & self.predictor.worth_a_thought(
                torch.stack(states, dim=1), base_logits, thinking.think, thinking.gain_threshold
            )
            most = int(self._thinking_behind(thinks).sum(dim=1).max())
            thinker = self._thinker(thinks, most) if most else None
        logits, thoughts = base_logits, None
        if thinker is not None:
            logits, thoughts = self._think(thinker, thinks, torch.stack(states, dim=1), base_logits)
        before = list(self.ends)
        if self.thinking.draft_length is None or not self.rules.stateless or self.shuffled:
            self._keep_in_step(drafts, draft_scores, logits)
        else:
            self._keep(drafts, draft_scores, logits)
        self._remember(before, thinks, base_logits, logits, thoughts)

    def _read(self, ahead: int, thinker: Thinker | None) -> Tensor:
        """Hidden state [B, H] of the base model behind the token ``ahead`` columns from the last of each row.

        Reads that token, at first the whole prompt. A ``thinker`` starts its thoughts in the same pass.
        """
        if not self.cache.keys:
            columns, end = torch.arange(self.prompt_length, device=self.ids.device)[None], self.prompt_length
            columns, together = columns.expand(len(self.ids), -1), True
        else:
            last = [length - 1 + ahead for length in self.lengths]
            columns, end = self._column(last), max(last) + 1
            together = min(last) + 1 == end
        text = self.predictor.decoder.embed(self.ids.gather(1, columns))
        self.cache.extend(TextRows(columns, self.key_start, together), end)
        positions = self.position_ids.gather(1, columns)
        if thinker is None:
            return self.predictor.decoder(text, positions, self.cache)[:, -1]
        return thinker.read(text, positions)[:, -1]

    def _thinker(self, thinks: Tensor, most: int) -> Thinker:
        """A thinker behind those positions of the round that ``thinks`` [B, P] names, ``most`` in a row.

        The chosen positions of each row are moved to the front; rows that have fewer are filled up with inactive ones.
        """
        chosen = self._chosen(thinks, most)
        ahead = chosen.masked_fill(self._where_stopped()[:, None], 0)
        anchors = torch.where(self._thinking_behind(thinks).gather(1, chosen), self._column(self.ends) - 1 + ahead, -1)
        positions = self.position_ids.gather(1, anchors.clamp_min(0))
        return self.predictor.thinker(
            self.cache, anchors, positions, self.key_start, self.thought_states, thought_length=self.thought_length
        )

    def _chosen(self, thinks: Tensor, most: int) -> Tensor:
        return self._thinking_behind(thinks).logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :most]

    def _thinking_behind(self, thinks: Tensor) -> Tensor:
        """Behind which positions thoughts stand if those that ``thinks`` names want one, both bool [B, P].

        Where rows think for each other, every row thinks where any row wants a thought, and at the end of its text if
        it has stopped.
        """
        return thinks.any(dim=0).expand_as(thinks) if self.shuffled else thinks

    def _given(self, ahead: Tensor) -> Tensor:
        """Given thoughts [B, P, k] behind the tokens ``ahead`` [P] or [B, P] columns from the last of each row."""
        new = self._column(self.lengths) - self.prompt_length + ahead
        row = torch.arange(len(new), device=new.device)[:, None]
        return self.given[row, new.clamp_max(self.given.shape[1] - 1)]

    def _think(
        self, thinker: Thinker, thinks: Tensor, hidden: Tensor, base_logits: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Think, and predict with it.

        Args:
            thinker: from ``_thinker``.
            thinks: bool [B, P], the positions it thinks behind.
            hidden: [B, P, H], the base model behind the last token of each row and behind its drafts.
            base_logits: [B, P, V], its predictions.

        Returns:
            The predictions [B, P, V], those of the base model where it did not think; the thoughts [B, P, k] and their
            weights [B, P], −1 and 0 where it did not. (−1 also behind the end of a thought.)
        """
        config, most = self.config, thinker.positions.shape[1]
        chosen = self._chosen(thinks, most)
        if self.given is None:
            tokens = thinker.sample(config.thought_temperature, self.predictor.thought_token_ids, None)
        else:
            tokens = self._given(chosen)
            if not config.learned_thought_end:
                tokens = tokens.clamp_min(0)
        if self.shuffled:  # the thinker has read the thought of its own row
            tokens, thinker = tokens.roll(-self.returned, dims=0), self._thinker(thinks, most)
        thought_hidden = thinker.finish(tokens)
        row = torch.arange(len(thinks), device=thinks.device)[:, None]
        active = thinks[row, chosen]
        base_hidden = hidden[row, chosen]
        weight = self.predictor.mixing_head(base_hidden, thought_hidden)
        mixed = self._logits(torch.lerp(base_hidden, thought_hidden, weight[..., None]))
        logits = base_logits.clone()
        logits[row, chosen] = torch.where(active[..., None], mixed, logits[row, chosen])
        thoughts = torch.full((*thinks.shape, tokens.shape[-1]), -1, device=thinks.device)
        thoughts[row, chosen] = tokens.masked_fill(~active[..., None], -1)
        weights = torch.zeros(thinks.shape, device=thinks.device)
        weights[row, chosen] = weight.float().masked_fill(~active, 0)
        return logits, (thoughts, weights)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in float32 as transformers' loops take them."""
        return self.predictor.text_logits(hidden).float()

    def _process(self, processors: list, logits: Tensor, ahead: int) -> Tensor:
        """Logits [B, V] of the tokens ``ahead`` columns behind the end of each row, through logits processors.

        Processors take a batch of one length: they are called for every length there is, with all rows, since some of
        them go by the row's number.
        """
        lengths = set(self.lengths) if processors else {0}
        processed = {n: self.rules.process(processors, self.ids[:, : n + ahead], logits) for n in lengths}
        if len(processed) == 1:
            return processed.popitem()[1]
        return torch.stack([processed[length][b] for b, length in enumerate(self.lengths)])

    def _draw(self, scores: Tensor) -> Tensor:
        """A token [B, 1] from scores [B, V]."""
        if self.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), 1)
        return scores.argmax(dim=-1, keepdim=True)

    def _keep(self, drafts: list[Tensor], draft_scores: list[Tensor], logits: Tensor) -> None:
        """Every row takes in the drafts [B, 1] it accepts and one token more.

        Args:
            drafts: from ``draft_scores`` [B, V], one after the other.
            logits: [B, n + 1, V], the predictions that drafts are judged by, before processors.
        """
        count = len(drafts)
        scores = torch.stack([self._process(self.rules.processors, x, i) for i, x in enumerate(logits.unbind(1))], 1)
        drafted = torch.cat(drafts, dim=1) if drafts else self.ids[:, :0]
        drafted_by = torch.stack(draft_scores, dim=1) if drafts else scores[:, :0]
        accepted, token = verify(drafted, drafted_by, scores, self.do_sample)
        accepted = accepted.tolist()
        self.ids.scatter_(1, self._column([n + m for n, m in zip(self.lengths, accepted, strict=True)]), token[:, None])
        self.draft_length.learn([m for m, done in zip(accepted, self.stopped, strict=True) if not done], count)
        self._grow(accepted)

    def _keep_in_step(self, drafts: list[Tensor], draft_scores: list[Tensor], logits: Tensor) -> None:
        """All rows take in as many tokens as all accept; arguments as for ``_keep``.

        Processors and criteria are called as in transformers' own loop: in turn, and once for every token that is kept.
        """
        for i, predicted in enumerate(logits.unbind(1)):
            scores = self._process(self.rules.processors, predicted, 0)
            growing = [not done for done in self.stopped]
            goes_on = i < len(drafts)
            if goes_on:
                accepted, other = verify(drafts[i], draft_scores[i][:, None], scores[:, None], self.do_sample)
                token = torch.where(accepted.bool(), drafts[i][:, 0], other)
                accepted = [n for n, grows in zip(accepted.tolist(), growing, strict=True) if grows]
                self.draft_length.learn(accepted, 1)
                goes_on = all(accepted)
            else:
                token = self._draw(scores)[:, 0]
            self._append(token)
            # What a row that has just stopped lent to others behind its drafts, it thought behind text it has not.
            lent = self.shuffled and self.stopped.count(False) < sum(growing)
            if not goes_on or lent or all(self.stopped):
                return

    def _append(self, token: Tensor) -> None:
        """All rows, in step, grow by a token [B]; stopped ones by padding."""
        length = self.lengths[0] + 1
        self.ids[:, length - 1] = token.masked_fill(self._where_stopped(), self.pad)
        self.lengths = [length] * len(token)
        self.ends = [end if done else length for end, done in zip(self.ends, self.stopped, strict=True)]
        self.asked_to_stop |= self.rules.criteria(self.ids[:, :length], None)
        stop = self.asked_to_stop if self.rules.pads else self.asked_to_stop.all().expand(len(token))
        self.stopped = stop.tolist()

    def _grow(self, accepted: list[int]) -> None:
        """Take in the accepted drafts and one token more, up to where a stopping criterion holds."""
        lengths, stopped = list(self.lengths), list(self.stopped)
        target = [n if done else n + m + 1 for n, m, done in zip(lengths, accepted, stopped, strict=True)]
        for length in range(min(lengths) + 1, max(target) + 1):
            growing = [b for b, own in enumerate(lengths) if own == length - 1 < target[b] and not stopped[b]]
            if growing:
                stop = self.rules.criteria(self.ids[:, :length], None).tolist()
            for b in growing:
                lengths[b], stopped[b] = length, stop[b]
        self.lengths, self.ends, self.stopped = lengths, list(lengths), stopped

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
            for b, (start, end) in enumerate(zip(before, self.ends, strict=True))
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
        certain = min(growing, default=max(self.ends))
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
        behind = torch.arange(width, device=self.ids.device) >= self._column(self.ends)
        return self.ids[:, :width].masked_fill(behind, self.pad)

    def _output(self) -> QuietStarGenerateOutput:
        new = max(self.ends) - self.prompt_length
        details = [detail[:, :new] for detail in self.details] or [None] * 4
        return QuietStarGenerateOutput(
            self._text(max(self.ends)),
            torch.tensor([end - self.prompt_length for end in self.ends]),
            self.thinks[:, :new],
            *details,
            drafted=self.draft_length.drafted,
            accepted=self.draft_length.accepted,
        )

    def _where_stopped(self) -> Tensor:
        """Bool [B]."""
        return torch.tensor(self.stopped, device=self.ids.device)

    def _column(self, numbers: list[int]) -> Tensor:
        """Numbers of the rows as int64 [B, 1] on the device."""
        return torch.tensor(numbers, device=self.ids.device)[:, None]
