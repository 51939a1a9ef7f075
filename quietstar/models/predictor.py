"""Passes over a text and its thoughts: sampling thoughts, prediction and training."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from quietstar.models.anchors import check_anchors, choose_anchors, eligible, select
from quietstar.models.configuration import QuietStarConfig
from quietstar.models.decoder import Decoder, HiddenStates
from quietstar.models.defaults import Think
from quietstar.models.documents import IGNORE_INDEX, at_anchors, document_starts, text_labels
from quietstar.models.ending import EndingThinker
from quietstar.models.gain import gain_loss, require_gain_head
from quietstar.models.head import Head
from quietstar.models.layers import GainHead, MixingHead, ThoughtAlone, ThoughtEmbedding
from quietstar.models.layouts import BaseStates, TextCache, TextRows, ThoughtStates, ThoughtTree
from quietstar.models.lengths import behind_ends, ends_are_behind, lengths_of, slots_of
from quietstar.models.objective import Given, likelihood_objective
from quietstar.models.outputs import QuietStarOutput
from quietstar.models.text import Text, check_tokens
from quietstar.models.thoughts import Thinker
from quietstar.models.transformers_names import CACHE


class Predictor:
    """The parts of a model during a pass.

    Args:
        config: the model's configuration.
        decoder: the decoder without a head.
        lm_head: the layer whose weight [V, H] is the head's matrix.
        start_embedding, end_embedding: embeddings of the thought tokens.
        mixing_head: predicts the weight of the prediction after a thought.
        gain_head: predicts what a thought will gain, if the model has one.
    """

    def __init__(
        self,
        config: QuietStarConfig,
        decoder: Decoder,
        lm_head: nn.Linear,
        start_embedding: ThoughtEmbedding,
        end_embedding: ThoughtEmbedding,
        mixing_head: MixingHead | ThoughtAlone,
        gain_head: GainHead | None,
    ):
        self.config, self.decoder, self.lm_head, self.mixing_head = config, decoder, lm_head, mixing_head
        self.gain_head = gain_head
        self.start, self.end = start_embedding(), end_embedding()
        self.head = Head.of(lm_head, config.text_config, self.start.dtype)
        self._thought_token_ids: tuple[int, int] | None = None

    @property
    def thought_token_ids(self) -> tuple[int, int]:
        """The configuration's ids, cached since the configuration checks them on every access."""
        if self._thought_token_ids is None:  # not a cached_property, whose lock Dynamo does not support
            self._thought_token_ids = self.config.thought_token_ids
        return self._thought_token_ids

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits [..., V] of hidden states [..., H]."""
        return self.head.shaped(self.lm_head(hidden))

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Compute logits [..., V] with −inf for the thought tokens, which are never text."""
        logits = self.logits(hidden)
        for token in self.thought_token_ids:
            logits[..., token] = -torch.inf
        return logits

    def worth_a_thought(self, hidden: Tensor, logits: Tensor, think: Think, gain_threshold: float) -> Tensor:
        """Decide after which base states [..., H], with predictions ``logits`` [..., V], to think: bool [...].

        ``think`` and ``gain_threshold`` are those of ``generate``.
        """
        if think in ("always", "never"):
            return torch.full(hidden.shape[:-1], think == "always", device=hidden.device)
        if think == "learned":
            return require_gain_head(self.gain_head, self.config)(hidden) > gain_threshold
        return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1) > think

    def thinker(
        self,
        base: BaseStates | TextCache,
        anchors: Tensor,
        anchor_positions: Tensor,
        key_start: Tensor | None,
        states: ThoughtStates | None = None,
        thought_length: int | None = None,
    ) -> Thinker:
        """Create a thinker at ``anchors`` [B, P], columns of the text, with ``anchor_positions`` [B, P]."""
        thought_length = self.config.thought_length if thought_length is None else thought_length
        kind = EndingThinker if self.config.learned_thought_end else Thinker
        return kind(
            self.decoder, self.head, base, anchors, anchor_positions, self.start, self.end, thought_length, key_start,
            states,
        )  # fmt: skip

    @torch.no_grad()
    def thoughts_behind(
        self, text: Text, starts: Tensor | None, anchors: Tensor, temperature: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Sample thoughts int64 [B, P, k] after ``anchors`` [B, P]."""
        position_ids = text.positions()
        base = BaseStates(TextRows(torch.arange(text.shape[1], device=text.device)[None], starts))
        thinker = self.thinker(
            base, anchors, position_ids.gather(1, anchors.clamp_min(0)), at_anchors(starts, anchors)
        )  # fmt: skip
        thinker.read(text.embedded(self.decoder.embed), position_ids)
        temperature = self.config.thought_temperature if temperature is None else temperature
        return thinker.sample(temperature, self.thought_token_ids, generator, finishes=False)

    def thoughts_at(self, text: Text, starts: Tensor | None, anchors: Tensor | None) -> Tensor:
        """Sample N thoughts after ``anchors`` [B, A] or every position, int64 [B, N, A or L, k]; −1 for none."""
        if anchors is None:
            return self.thoughts_everywhere(text, starts)
        count = self.config.num_thoughts
        tokens = self.thoughts_behind(text, starts, anchors.repeat_interleave(count, dim=1))
        return tokens.unflatten(1, (-1, count)).transpose(1, 2).masked_fill(anchors[:, None, :, None] < 0, -1)

    def thoughts_everywhere(
        self, text: Text, starts: Tensor | None, temperature: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Sample N thoughts after every position, int64 [B, N, L, k]."""
        batch, length = text.shape
        anchors = torch.arange(length, device=text.device).repeat_interleave(self.config.num_thoughts)
        tokens = self.thoughts_behind(text, starts, anchors.expand(batch, -1), temperature, generator)
        return tokens.unflatten(1, (length, -1)).transpose(1, 2)

    def _labels(self, text: Text, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Check labels, and return them with −100 where nothing is predicted, and where documents begin."""
        batch, length = text.shape
        if labels.shape != text.shape:
            raise ValueError(f"labels must have the shape of input_ids, {[batch, length]}, got {list(labels.shape)}")
        least = self.config.lookahead + 2
        if length < least:
            raise ValueError(f"input_ids must have at least lookahead + 2 = {least} tokens per sequence, got {length}")
        starts = document_starts(text.attention_mask, text.position_ids, text.shape)
        labels = text_labels(labels, text.attention_mask, starts)
        check_tokens("labels", labels, self.config.vocab_size, ignore=IGNORE_INDEX)
        return labels, starts

    def base_nll(self, text: Text, labels: Tensor) -> Tensor:
        """Compute the nll of the prediction without thoughts, [B, L−1]."""
        labels, starts = self._labels(text, labels)
        hidden = self._base_pass(text, starts)
        rows = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return self.head.cross_entropy(*rows, ignore_index=IGNORE_INDEX, reduction="none").view(len(labels), -1)

    def chosen_anchors(self, text: Text, labels: Tensor) -> Tensor | None:
        """Choose the positions that think in training, as the configuration says: int64 [B, A], or None for all."""
        return self._anchors(text, *self._labels(text, labels), None)

    def _anchors(self, text: Text, labels: Tensor, starts: Tensor | None, given: Tensor | None) -> Tensor | None:
        """Return the ``given`` anchors, checked, or those that the configuration chooses."""
        if given is not None:
            return check_anchors(given, text.shape)
        choice, count = self.config.anchor_choice, self.config.anchors_per_text
        if choice == "given":
            raise ValueError("anchors must be given with anchor_choice 'given', got None")
        if count is None:
            return None
        allowed, score = eligible(labels, self.config.lookahead, starts), None
        if choice == "entropy":
            hidden = self._base_pass(text, starts)[:, :-1]
            score = self.head.entropy(hidden.flatten(0, 1)).view(allowed.shape)
        return choose_anchors(allowed, count, score)

    @torch.no_grad()
    def _base_pass(self, text: Text, starts: Tensor | None) -> Tensor:
        """Compute the hidden states [B, L, H] of the text alone."""
        rows = TextRows(torch.arange(text.shape[1], device=text.device)[None], starts)
        return self.decoder(text.embedded(self.decoder.embed), text.positions(), BaseStates(rows))

    def train(
        self, text: Text, labels: Tensor, thought_tokens: Tensor | None, anchors: Tensor | None, given: Given,
        output_thought_logprobs: bool, output_thought_entropy: bool, collect: HiddenStates | None,
    ) -> QuietStarOutput:  # fmt: skip
        """Run one pass over base text and thoughts (the thought tree), and compute the objective."""
        config = self.config
        k, lookahead, num_thoughts = config.thought_length, config.lookahead, config.num_thoughts
        batch, length = text.shape
        device = text.device
        labels, starts = self._labels(text, labels)
        anchors = self._anchors(text, labels, starts, anchors)
        if thought_tokens is None:
            thought_tokens = self.thoughts_at(text, starts, anchors)
        else:
            count = length if anchors is None else anchors.shape[1]
            thought_tokens = self._given_thoughts(thought_tokens, (batch, num_thoughts, count, k), anchors is not None)
        own_tokens, chosen = thought_tokens, anchors
        if anchors is None:  # the last position has nothing to predict
            own_tokens, chosen = thought_tokens[:, :, :-1], torch.arange(length - 1, device=device)
        given.check(config, (batch, length), own_tokens.shape)
        own_tokens = own_tokens.transpose(1, 2)  # [B, A, N, k]
        behind = chosen.repeat_interleave(num_thoughts, dim=-1)
        hidden = self._tree(text, starts, own_tokens.flatten(1, 2), behind, collect)
        base_hidden = hidden[:, :length]
        slots = hidden[:, length:].unflatten(1, (chosen.shape[-1], num_thoughts, k + lookahead + 1))
        thought_hidden = slots[:, :, :, k + 1 :]
        if config.learned_thought_end:
            thought_hidden = behind_ends(slots, lengths_of(own_tokens), lookahead)

        ahead = chosen.clamp_min(0)[..., None] + torch.arange(lookahead, device=device)
        weight = self.mixing_head(base_hidden, thought_hidden, ahead.clamp_max(length - 1)[..., None, :])
        parts = likelihood_objective(
            base_hidden, slots[:, :, :, :k], thought_hidden, weight, self.head, labels, own_tokens, config, starts,
            anchors, given, output_thought_logprobs, output_thought_entropy,
        )  # fmt: skip
        output = QuietStarOutput(
            thought_tokens=thought_tokens, mixing_weight=weight.detach().transpose(1, 2), anchors=anchors,
            thought_lengths=lengths_of(thought_tokens) if config.learned_thought_end else None, **parts._asdict(),
        )  # fmt: skip
        if config.gain_weight > 0:
            expected = require_gain_head(self.gain_head, config)(base_hidden[:, :-1])
            error = gain_loss(expected, output.base_nll, output.talk_nll, labels, anchors)
            output.loss, output.gain_loss = output.loss + config.gain_weight * error, error.detach()
            output.expected_gain = expected.detach()
        return output

    def _tree(
        self, text: Text, starts: Tensor | None, thoughts: Tensor, anchors: Tensor, collect: HiddenStates | None
    ) -> Tensor:
        """Run one pass over the text and the slots after anchors; returns hidden states [B, L + P·S, H].

        Args:
            text: B texts of L tokens.
            thoughts: int64 [B, P, k].
            anchors: int64 [P] or [B, P], −1 for none.
        """
        position_ids, length = text.positions(), text.shape[1]
        here = anchors.clamp_min(0)
        positions = position_ids[:, here] if anchors.dim() == 1 else position_ids.gather(1, here)
        steps = torch.arange(1, self.config.thought_length + self.config.lookahead + 2, device=text.device)
        slot_positions = positions[:, :, None] + steps
        lengths = lengths_of(thoughts) + self.config.lookahead + 1 if self.config.learned_thought_end else None
        rows = TextRows(torch.arange(length, device=text.device)[None], starts)
        return self.decoder(
            self._tree_embeddings(text, thoughts, here),
            torch.cat([position_ids, slot_positions.flatten(1)], dim=1),
            ThoughtTree(rows, anchors, at_anchors(starts, anchors), lengths),
            collect,
        )

    def _tree_embeddings(self, text: Text, thoughts: Tensor, anchors: Tensor) -> Tensor:
        """Embed the text and the slots (start, k thought tokens, end, M−1 real tokens): [B, L + P·S, H].

        Args:
            text: B texts of L tokens.
            thoughts: int64 [B, P, k].
            anchors: int64 [P] or [B, P], the positions of the thoughts.
        """
        batch, length = text.shape
        embedded, inside = text.embedded_with(thoughts.clamp_min(0).flatten(1), self.decoder.embed)
        following = anchors[..., None] + torch.arange(1, self.config.lookahead, device=anchors.device)
        following = following.clamp_max(length - 1)
        start, end = (x.expand(batch, anchors.shape[-1], 1, -1) for x in (self.start, self.end))
        parts = start, inside.unflatten(1, thoughts.shape[1:]), end, select(embedded, following, anchors.dim() == 2)
        slots = slots_of(thoughts, *parts) if self.config.learned_thought_end else torch.cat(parts, dim=2)
        return torch.cat([embedded, slots.flatten(1, 2)], dim=1)

    def predict(
        self, text: Text, cache: Cache | None, use_cache: bool | None, logits_to_keep: int | Tensor,
        thought_tokens: Tensor | None, suppress_thought_tokens: bool, thought_states: ThoughtStates | None,
        collect: HiddenStates | None, recomputed: bool,
    ) -> QuietStarOutput:  # fmt: skip
        """Run a base pass, think after each kept position, and compute the mixed logits there.

        Arguments are those of the model's ``forward``; ``recomputed`` says that the backward runs layers again.
        """
        config, (batch, length) = self.config, text.shape
        past = 0 if cache is None else cache.get_seq_length()
        if isinstance(past, Tensor):  # a static cache updates its count in place, on its device
            past = past.clone()
        starts = text.starts(past, use_cache if cache is None else True, thought_states)
        packed = starts is not None and starts.dim() == 2
        position_ids = text.positions(past)
        if recomputed and cache is not None:
            raise ValueError(f"{CACHE} must be None with gradient checkpointing, got {type(cache).__name__}")
        wants_cache = use_cache or (use_cache is None and config.use_cache)
        if cache is None and wants_cache and not packed and not recomputed:
            cache = DynamicCache(config=config.text_config)
        columns = torch.arange(length, device=text.device) + past
        filled = cache is None or isinstance(cache, DynamicCache)  # a static one has unused room at its end
        base = BaseStates(TextRows(columns[None], starts, filled), cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        anchors = columns[kept]
        if recomputed and thought_tokens is None:  # a pass that is run again must use the same thoughts
            thought_tokens = self.thoughts_behind(text, starts, anchors.expand(batch, -1))[:, None]
        if thought_tokens is not None:
            shape = batch, 1, len(anchors), config.thought_length
            thought_tokens = self._given_thoughts(thought_tokens, shape)[:, 0]
        thinker = self.thinker(
            base, anchors.expand(batch, -1), position_ids[:, kept], at_anchors(starts, anchors), thought_states
        )
        embeddings = text.embedded(self.decoder.embed)
        base_hidden = thinker.read(embeddings, position_ids, thought_tokens, collect)[:, kept]
        # Calls are faster in inference mode, but its tensors must not be returned to callers that may train on them.
        quick = thought_states is not None and not torch.compiler.is_compiling()
        with torch.inference_mode() if quick else nullcontext():
            if thought_tokens is None:
                thought_tokens = thinker.sample(config.thought_temperature, self.thought_token_ids, None)
            thought_hidden = thinker.finish(thought_tokens)
        weight = self.mixing_head(base_hidden, thought_hidden)
        mixed = torch.lerp(base_hidden, thought_hidden, weight[..., None])
        return QuietStarOutput(
            logits=self.text_logits(mixed) if suppress_thought_tokens else self.logits(mixed),
            **{CACHE: cache},
            thought_tokens=thought_tokens[:, None],
            mixing_weight=weight[:, None, :, None],
            thought_lengths=lengths_of(thought_tokens)[:, None] if config.learned_thought_end else None,
        )

    def _given_thoughts(
        self, thought_tokens: Tensor, shape: tuple[int, int, int, int], may_lack: bool = False
    ) -> Tensor:
        """Check given thought tokens and return them as [B, N, positions, k]; if ``may_lack``, −1 stands for none."""
        flat = shape[0] * shape[1], *shape[2:]
        if tuple(thought_tokens.shape) not in (shape, flat):
            raise ValueError(f"thought_tokens must have shape {list(shape)}, got {list(thought_tokens.shape)}")
        ends = self.config.learned_thought_end
        check_tokens("thought_tokens", thought_tokens, self.config.vocab_size, ignore=-1 if may_lack or ends else None)
        if ends and not ends_are_behind(thought_tokens, may_lack):
            raise ValueError("thought_tokens must be -1 behind the end of a thought only, got -1 in another place")
        return thought_tokens.reshape(shape)
