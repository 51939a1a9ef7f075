"""The decoding loop for the options of ``generate``: drafting, selective thinking, rows that grow at unequal pace."""

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
    """Generate text in place of transformers' own loop, with the arguments that transformers prepares for it.

    Raises:
        ValueError: an option is set that this loop does not support.
    """
    thinking.refuse_others(generation_config, synced_gpus=synced_gpus, **others)
    if isinstance(streamer, ThoughtStreamer) and len(input_ids) > 1:
        raise ValueError(f"streamer must be given one sequence, got {len(input_ids)}")
    with torch.inference_mode():  # calls are faster in it
        loop = _Loop(model, input_ids, attention_mask, position_ids, generation_config, thinking)
        loop.rules, loop.streamer = TextRules(logits_processor, stopping_criteria), streamer
        output = loop.run()
    # Copies, so that the result can be used in training.
    output = type(output)(**{key: x.clone() if isinstance(x, Tensor) else x for key, x in output.items()})
    if streamer is not None:
        streamer.end()
    return output if thinking.return_thoughts or generation_config.return_dict_in_generate else output.sequences


class _Loop:
    """The state of one call. Column j of ``ids`` and key j of the cache belong together.

    With drafts, each row grows at its own pace, and ``lengths`` (on the host) holds the length of each. Columns after a
    row's length are left over from rejected drafts and never read. Rows that have stopped are still computed but no
    longer grow. Without drafts, with logits processors that keep a state, or with shuffled thoughts, all rows grow in
    step, and rows that have stopped grow by padding. ``ends`` holds the lengths of the texts without that padding.
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

        capacity = self.max_length + self.draft_length.longest + 1  # stopped rows are still computed
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

        # Details of every new token, stored only if requested.
        new = batch, capacity - prompt
        self.thinks = torch.zeros(new, dtype=torch.bool, device=device)
        self.details: list[Tensor] = []
        if thinking.return_thoughts:
            thoughts = torch.full((*new, self.thought_length), -1, device=device)
            self.details = [thoughts, *torch.zeros(3, *new, device=device).unbind()]

    def run(self) -> QuietStarGenerateOutput:
        """Run rounds of drafting and thinking until every row has stopped."""
        while True:
            left = self.max_length - min(n for n, done in zip(self.lengths, self.stopped, strict=True) if not done)
            self._round(min(self.draft_length(), left - 1))
            self._stream()
            if all(self.stopped):
                return self._output()

    def _round(self, count: int) -> None:
        """Draft ``count`` ≥ 0 tokens after every row, think after all of them, and keep the accepted ones."""
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
        """Read the token ``ahead`` columns after the last of each row (in the first call, the whole prompt).

        Returns the base model's hidden state [B, H] there. A ``thinker`` starts its thoughts in the same pass.
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
        """Create a thinker for the round's positions selected by ``thinks`` [B, P], at most ``most`` per row.

        The selected positions of each row are moved to the front; rows with fewer are padded with inactive anchors.
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
        """Return the positions that actually think, given those that want a thought; both bool [B, P].

        With shuffled thoughts, every row thinks where any row wants a thought; a row that has stopped thinks at the
        end of its text.
        """
        return thinks.any(dim=0).expand_as(thinks) if self.shuffled else thinks

    def _given(self, ahead: Tensor) -> Tensor:
        """Return the given thoughts [B, P, k] for the tokens ``ahead`` [P] or [B, P] columns after each row's last."""
        new = self._column(self.lengths) - self.prompt_length + ahead
        row = torch.arange(len(new), device=new.device)[:, None]
        return self.given[row, new.clamp_max(self.given.shape[1] - 1)]

    def _think(
        self, thinker: Thinker, thinks: Tensor, hidden: Tensor, base_logits: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Think, and compute the predictions after the thoughts.

        Args:
            thinker: from ``_thinker``.
            thinks: bool [B, P], the positions that think.
            hidden: [B, P, H], hidden states of the base model at the last token of each row and at its drafts.
            base_logits: [B, P, V], the base model's predictions.

        Returns:
            The predictions [B, P, V], which are the base model's at positions that do not think; and the thoughts
            [B, P, k] and their weights [B, P], −1 and 0 at such positions. (Thoughts are −1 also after their end.)
        """
        config, most = self.config, thinker.positions.shape[1]
        chosen = self._chosen(thinks, most)
        if self.given is None:
            tokens = thinker.sample(config.thought_temperature, self.predictor.thought_token_ids, None)
        else:
            tokens = self._given(chosen)
            if not config.learned_thought_end:
                tokens = tokens.clamp_min(0)
        if self.shuffled:  # the first thinker's cache holds each row's own thought
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
        """Compute logits [..., V] in float32, as transformers' loops do."""
        return self.predictor.text_logits(hidden).float()

    def _process(self, processors: list, logits: Tensor, ahead: int) -> Tensor:
        """Apply logits processors to logits [B, V] of the tokens ``ahead`` columns after the end of each row.

        Processors expect rows of equal length. So they are called once for every length that occurs, always with all
        rows, since some of them depend on the row's index.
        """
        lengths = set(self.lengths) if processors else {0}
        processed = {n: self.rules.process(processors, self.ids[:, : n + ahead], logits) for n in lengths}
        if len(processed) == 1:
            return processed.popitem()[1]
        return torch.stack([processed[length][b] for b, length in enumerate(self.lengths)])

    def _draw(self, scores: Tensor) -> Tensor:
        """Draw a token [B, 1] from scores [B, V]."""
        if self.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), 1)
        return scores.argmax(dim=-1, keepdim=True)

    def _keep(self, drafts: list[Tensor], draft_scores: list[Tensor], logits: Tensor) -> None:
        """Append to every row the drafts [B, 1] it accepts and one more token.

        Args:
            drafts: the drafted tokens, each drawn from its ``draft_scores`` [B, V].
            logits: [B, n + 1, V], the predictions that drafts are compared with, before processors.
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
        """Append to all rows as many tokens as all rows accept; the arguments are those of ``_keep``.

        Processors and criteria are called as in transformers' own loop: in order, once for every token that is kept.
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
            # Later thoughts that a row lends to others follow its drafts, which are not its text if it just stopped.
            lent = self.shuffled and self.stopped.count(False) < sum(growing)
            if not goes_on or lent or all(self.stopped):
                return

    def _append(self, token: Tensor) -> None:
        """Append a token [B] to all rows in step; padding to those that have stopped."""
        length = self.lengths[0] + 1
        self.ids[:, length - 1] = token.masked_fill(self._where_stopped(), self.pad)
        self.lengths = [length] * len(token)
        self.ends = [end if done else length for end, done in zip(self.ends, self.stopped, strict=True)]
        self.asked_to_stop |= self.rules.criteria(self.ids[:, :length], None)
        stop = self.asked_to_stop if self.rules.pads else self.asked_to_stop.all().expand(len(token))
        self.stopped = stop.tolist()

    def _grow(self, accepted: list[int]) -> None:
        """Grow rows by their accepted drafts and one more token, up to where a stopping criterion holds."""
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
        """Store the details of the tokens that rows gained since ``before``; tensors are those of the round."""
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
        """Pass the columns that are final in every row to the streamer."""
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
        """Return the first columns of all rows, int64 [B, width], padded after the end of rows that have stopped."""
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
        """Return which rows have stopped, bool [B]."""
        return torch.tensor(self.stopped, device=self.ids.device)

    def _column(self, numbers: list[int]) -> Tensor:
        """Convert one number per row to int64 [B, 1] on the device."""
        return torch.tensor(numbers, device=self.ids.device)[:, None]
