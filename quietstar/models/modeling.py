"""The model: Mistral that thinks before every token, for transformers."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from quietstar.models import checkpoint
from quietstar.models.attention import ATTENTION_NAME, BaseStates, ThoughtStates, ThoughtTree
from quietstar.models.configuration import QuietStarConfig
from quietstar.models.documents import (
    IGNORE_INDEX,
    at_anchors,
    document_starts,
    first_key,
    packed_mask,
    text_labels,
)
from quietstar.models.generation import ThinkingGeneration
from quietstar.models.layers import MixingHead, ThoughtEmbedding, ZeroLinear
from quietstar.models.objective import quiet_star_objective
from quietstar.models.other_trainers import RefusesOtherTrainers
from quietstar.models.text import Text
from quietstar.models.thoughts import HiddenStates, Thinker, run_layers
from quietstar.models.transformers_names import CACHE, LeftByQuantisers, base_mask, only_cache
from quietstar.models.weights import weight_of
from quietstar.ops._checks import check_integer, check_range, check_tensor
from quietstar.ops._precision import autocast_inputs


@dataclass
class QuietStarOutput(CausalLMOutputWithPast):
    """Output of :class:`QuietStarForCausalLM`: with labels everything but logits and cache, without labels those.

    B sequences of L tokens, N thoughts per position, k tokens per thought, M look-ahead steps.
    Positions are those of the text the thought stands behind; negative log-likelihoods are in nats.

    Attributes:
        loss: scalar, base loss + mixed loss + weighted policy term.
        logits: [B, K, V], mixed logits of the next token at the K kept positions, in the model's dtype.
        cache: the base cache; ``past_key_values`` before transformers 5.24.
        base_nll: float [B, L−1], of token i+1 without a thought; 0 where there is no label.
        talk_nll: float [B, N, L−1, M], of token i+1+m after the thought behind i; 0 where there is no label.
        reward: float [B, N, L−1−M], what the thought gained: Σ_m base_nll[i+m] − talk_nll[i, m].
        advantage: float [B, N, L−1−M], what the policy term multiplies log p of the thought by: the reward minus its
            mean over the N thoughts of the position (for N > 1), 0 where that is negative.
        policy_loss: scalar, the REINFORCE term before its weight.
        thought_tokens: int64 [B, N, L, k] with labels, [B, 1, K, k] without.
        thought_logprobs: float [B, N, L−1, k], log p of the thought tokens at ``policy_temperature``; None if
            they were not asked for.
        thought_entropy: scalar, mean entropy of the distributions that thought tokens are drawn from (at
            ``thought_temperature``) in nats, of at most 64 thought tokens with something to predict, evenly spread;
            NaN where there is none, None if it was not asked for.
        mixing_weight: [B, N, L−1, M] with labels, [B, 1, K, 1] without.
    """

    base_nll: Tensor | None = None
    talk_nll: Tensor | None = None
    reward: Tensor | None = None
    advantage: Tensor | None = None
    policy_loss: Tensor | None = None
    thought_tokens: Tensor | None = None
    thought_logprobs: Tensor | None = None
    thought_entropy: Tensor | None = None
    mixing_weight: Tensor | None = None


class QuietStarForCausalLM(LeftByQuantisers, RefusesOtherTrainers, ThinkingGeneration, MistralForCausalLM):
    """Mistral with Quiet-STaR (arXiv 2403.09629): hidden thoughts behind every token.

    >>> model = QuietStarForCausalLM.from_base("a Mistral checkpoint", tokenizer=tokenizer)
    >>> model(input_ids, labels=input_ids).loss.backward()   # train
    >>> model.generate(input_ids, max_new_tokens=20)         # generate, thinking before every token
    >>> model.generate(input_ids, draft_length=8)            # text of the same distribution, faster
    """

    config_class = QuietStarConfig
    config: QuietStarConfig
    # The loss is a sum of means over different sets of tokens: gradient accumulation averages the micro-batches.
    accepts_loss_kwargs = False

    def __init__(self, config: QuietStarConfig):
        config.check()
        super().__init__(config)
        self.start_embedding = ThoughtEmbedding(config.hidden_size, config.embedding_scale)
        self.end_embedding = ThoughtEmbedding(config.hidden_size, config.embedding_scale)
        self.mixing_head = MixingHead(config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, ThoughtEmbedding):
            init.normal_(module.weight, std=self.config.initializer_range / module.scale)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Only our own attention lays out thoughts; any other request is an error."""
        if requested_attention not in (None, ATTENTION_NAME):
            raise ValueError(f"attn_implementation must be None or {ATTENTION_NAME!r}, got {requested_attention!r}")
        return ATTENTION_NAME

    from_base = classmethod(checkpoint.from_base)
    from_pretrained = classmethod(checkpoint.from_pretrained)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        thought_tokens: Tensor | None = None,
        output_thought_logprobs: bool = True,
        suppress_thought_tokens: bool = False,
        thought_states: ThoughtStates | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        output_thought_entropy: bool = False,
    ) -> QuietStarOutput | tuple:
        """Think behind every position and predict.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L] ([B, cached + L] with a cache), 1 for tokens, 0 for left or right padding.
            position_ids: int64 [B, L] or [1, L]; default 0..L−1 behind the cache. Where a position is not one more
                than the one before it a new document begins, which sees nothing of those in front of it.
            past_key_values, cache: base cache, under its old and its new name; inference only.
            labels: int64 [B, L], usually ``input_ids``; −100 and padding are ignored, and so is the first token of
                every document. With labels the output holds the loss and its parts and no logits; without, the mixed
                logits.
            use_cache: return the base cache; inference only.
            logits_to_keep: inference only: think and predict at the last so many positions (0: all), or at the
                positions a 1-D tensor names.
            thought_tokens: int64 [B, N, L, k] ([B·N, L, k] is taken too; [B, 1, K, k] without labels, K kept
                positions): use these thoughts instead of sampling them.
            output_thought_logprobs: with labels: give ``thought_logprobs``; a training step is a few per cent faster
                without, because thoughts that did not help then need no logits.
            suppress_thought_tokens: give the start and end token logit −inf, as ``generate`` does.
            thought_states: inference only: what ``generate`` keeps from one thought to the next.
            inputs_embeds: [B, L, H], embeddings of the text instead of ``input_ids``.
            output_hidden_states: give the hidden states of the base pass, [B, L, H] behind the embedding and behind
                each layer, the last one normed; a list names those wanted, None stands for the others.
            output_attentions: must be left out: no attention probabilities are kept.
            output_thought_entropy: with labels: give ``thought_entropy``, which costs about one per cent of a step.
            return_dict: False returns the values that are there as a tuple.

        Raises:
            TypeError, ValueError: a bad argument, named.
        """
        cache = only_cache(past_key_values, cache)
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions must be False: attention probabilities are never held as a whole")
        text = Text.of(input_ids, inputs_embeds, attention_mask, position_ids)
        if thought_states is None and input_ids is not None:  # ``generate`` has looked at its prompt
            self._check_tokens("input_ids", input_ids, self.config.vocab_size)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        collect = None if output_hidden_states is False else HiddenStates(text.shape[1])
        if labels is None:
            output = self._predict(
                text, cache, use_cache, logits_to_keep, thought_tokens, suppress_thought_tokens, thought_states, collect
            )  # fmt: skip
        elif cache is not None:
            raise ValueError(f"{CACHE} must be None with labels, got {type(cache).__name__}")
        else:
            output = self._train(
                text, labels, thought_tokens, output_thought_logprobs, output_thought_entropy, collect
            )  # fmt: skip
        if collect is not None:
            chosen = range(len(collect.states))
            if output_hidden_states is not True:
                chosen = {chosen[i] for i in output_hidden_states}
            output.hidden_states = tuple(states if i in chosen else None for i, states in enumerate(collect.states))
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    @torch.no_grad()
    def sample_thoughts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        anchors: Tensor | None = None,
        position_ids: Tensor | None = None,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample thoughts behind positions of a text.

        Args:
            input_ids, attention_mask, position_ids: as in :meth:`forward`.
            anchors: int [P] or [B, P]: think behind these positions, once each; −1 is inactive. Default: behind every
                position, ``config.num_thoughts`` times.
            temperature: default ``config.thought_temperature``; 0 is greedy.
            generator: source of the seeds, on the device of the model; default torch's global one.

        Returns:
            int64 [B, N, L, k], or [B, P, k] for given anchors (−1 in inactive ones).
        """
        text = Text.of(input_ids, None, attention_mask, position_ids)
        self._check_tokens("input_ids", input_ids, self.config.vocab_size)
        starts = document_starts(attention_mask, position_ids, text.shape)
        if anchors is None:
            return self._think_everywhere(text, starts, self._head_weight(), temperature, generator)
        anchors = anchors.expand(len(input_ids), -1).clamp_min(-1)
        tokens = self._thoughts_behind(text, starts, anchors, self._head_weight(), temperature, generator)
        return tokens.masked_fill(anchors[..., None] < 0, -1)

    def _think_everywhere(
        self, text: Text, starts: Tensor | None, head: Tensor, temperature: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """N thoughts behind every position, int64 [B, N, L, k]."""
        batch, length = text.shape
        anchors = torch.arange(length, device=text.device).repeat_interleave(self.config.num_thoughts)
        tokens = self._thoughts_behind(text, starts, anchors.expand(batch, -1), head, temperature, generator)
        return tokens.unflatten(1, (length, -1)).transpose(1, 2)

    @torch.no_grad()
    def _thoughts_behind(
        self, text: Text, starts: Tensor | None, anchors: Tensor, head: Tensor, temperature: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Thoughts int64 [B, P, k] behind ``anchors`` [B, P]."""
        position_ids = text.positions()
        embeddings = text.embedded(self.model.embed_tokens)
        base = BaseStates(self._base_mask(embeddings, text.attention_mask, starts))
        thinker = self._thinker(
            base, anchors, position_ids.gather(1, anchors.clamp_min(0)), at_anchors(starts, anchors), head=head
        )
        thinker.read(embeddings, position_ids)
        temperature = self.config.thought_temperature if temperature is None else temperature
        return thinker.sample(temperature, self.config.thought_token_ids, generator)

    def _train(
        self, text: Text, labels: Tensor, thought_tokens: Tensor | None, output_thought_logprobs: bool,
        output_thought_entropy: bool, collect: HiddenStates | None,
    ) -> QuietStarOutput:  # fmt: skip
        """One pass over base text and thoughts (the thought tree), and the objective."""
        config = self.config
        k, lookahead, num_thoughts = config.thought_length, config.lookahead, config.num_thoughts
        batch, length = text.shape
        device = text.device
        if labels.shape != text.shape:
            raise ValueError(f"labels must have the shape of input_ids, {[batch, length]}, got {list(labels.shape)}")
        if length < lookahead + 2:
            raise ValueError(
                f"input_ids must have at least lookahead + 2 = {lookahead + 2} tokens per sequence, got {length}"
            )
        starts = document_starts(text.attention_mask, text.position_ids, text.shape)
        labels = text_labels(labels, text.attention_mask, starts)
        self._check_tokens("labels", labels, config.vocab_size, ignore=IGNORE_INDEX)
        head = self._head_weight()
        if thought_tokens is None:
            thought_tokens = self._think_everywhere(text, starts, head)
        else:
            thought_tokens = self._given_thoughts(thought_tokens, (batch, num_thoughts, length, k))
        position_ids = text.positions()

        # The last position has nothing to predict.
        positions = length - 1
        anchors = torch.arange(positions, device=device).repeat_interleave(num_thoughts)
        own_tokens = thought_tokens[:, :, :positions].transpose(1, 2)  # [B, L−1, N, k]
        embeddings = self._tree_embeddings(text, own_tokens.flatten(1, 2), anchors)
        steps = k + lookahead + 1
        slot_positions = position_ids[:, anchors, None] + torch.arange(1, steps + 1, device=device)
        mask = self._base_mask(embeddings[:, :length], text.attention_mask, starts)
        hidden = run_layers(
            self.model,
            embeddings,
            torch.cat([position_ids, slot_positions.flatten(1)], dim=1),
            ThoughtTree(length, anchors, mask, at_anchors(starts, anchors)),
            collect,
        )
        del embeddings  # as large as the hidden states
        base_hidden = hidden[:, :length]
        thought_hidden = hidden[:, length:].unflatten(1, (positions, num_thoughts, steps))

        ahead = torch.arange(positions, device=device)[:, None] + torch.arange(lookahead, device=device)
        mixing_weight = self.mixing_head(
            base_hidden, thought_hidden[:, :, :, k + 1 :], ahead.clamp_max(positions)[:, None]
        )
        parts = quiet_star_objective(
            base_hidden, thought_hidden, mixing_weight, head, labels, own_tokens, config, starts,
            output_thought_logprobs, output_thought_entropy,
        )  # fmt: skip
        return QuietStarOutput(
            thought_tokens=thought_tokens, mixing_weight=mixing_weight.detach().transpose(1, 2), **parts._asdict()
        )

    def _tree_embeddings(self, text: Text, thoughts: Tensor, anchors: Tensor) -> Tensor:
        """Embeddings [B, L + P·S, H] of the text and of the slots: start, k thought tokens, end, M−1 real tokens.

        Args:
            text: B texts of L tokens.
            thoughts: int64 [B, P, k].
            anchors: int64 [P], the positions they stand behind.
        """
        batch, length = text.shape
        embedded, inside = text.embedded_with(thoughts.flatten(1), self.model.embed_tokens)
        following = anchors[:, None] + torch.arange(1, self.config.lookahead, device=anchors.device)
        slots = torch.cat(
            [
                self.start_embedding().expand(batch, len(anchors), 1, -1),
                inside.unflatten(1, thoughts.shape[1:]),
                self.end_embedding().expand(batch, len(anchors), 1, -1),
                embedded[:, following.clamp_max(length - 1)],
            ],
            dim=2,
        )
        return torch.cat([embedded, slots.flatten(1, 2)], dim=1)

    def _predict(
        self, text: Text, cache: Cache | None, use_cache: bool | None, logits_to_keep: int | Tensor,
        thought_tokens: Tensor | None, suppress_thought_tokens: bool, thought_states: ThoughtStates | None,
        collect: HiddenStates | None,
    ) -> QuietStarOutput:  # fmt: skip
        """A base pass, a thought behind each kept position, and the mixed logits there."""
        batch, length = text.shape
        past = 0 if cache is None else cache.get_seq_length()
        if isinstance(past, Tensor):  # a static cache counts on its device, in place
            past = past.clone()
        starts = self._starts(text, past, use_cache if cache is None else True, thought_states)
        packed = starts is not None and starts.dim() == 2
        position_ids = text.positions(past)
        recomputed = self.model.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if recomputed and cache is not None:
            raise ValueError(f"{CACHE} must be None with gradient checkpointing, got {type(cache).__name__}")
        wants_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and wants_cache and not packed and not recomputed:
            cache = DynamicCache(config=self.config)
        embeddings = text.embedded(self.model.embed_tokens)
        base = BaseStates(self._base_mask(embeddings, text.attention_mask, starts, cache), cache)
        # A sliding cache has dropped keys in front, a static one has room behind.
        dropped = 0 if cache is None else cache.get_mask_sizes(length, 0)[1]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        anchors = torch.arange(length, device=text.device)[kept] + (past - dropped)
        if recomputed and thought_tokens is None:  # a pass that is run again must know its thoughts before
            head = self._head_weight()
            thought_tokens = self._thoughts_behind(text, starts, anchors.expand(batch, -1), head)[:, None]
        key_start = at_anchors(starts, anchors)
        if key_start is not None and not packed and text.attention_mask.dim() == 2:
            key_start = (key_start - dropped).clamp_min(0)  # a mask of 4 dimensions is of the keys there are

        if thought_tokens is not None:
            shape = batch, 1, len(anchors), self.config.thought_length
            thought_tokens = self._given_thoughts(thought_tokens, shape)[:, 0]
        thinker = self._thinker(base, anchors.expand(batch, -1), position_ids[:, kept], key_start, thought_states)
        base_hidden = thinker.read(embeddings, position_ids, thought_tokens, collect)[:, kept]
        # Calls cost less in inference mode; what is made there must not reach those who may train on it.
        quick = thought_states is not None and not torch.compiler.is_compiling()
        with torch.inference_mode() if quick else nullcontext():
            if thought_tokens is None:
                thought_tokens = thinker.sample(self.config.thought_temperature, self.config.thought_token_ids, None)
            thought_hidden = thinker.finish(thought_tokens)
        weight = self.mixing_head(base_hidden, thought_hidden)
        mixed = torch.lerp(base_hidden, thought_hidden, weight[..., None])
        return QuietStarOutput(
            logits=self._text_logits(mixed) if suppress_thought_tokens else self.lm_head(mixed),
            **{CACHE: cache},
            thought_tokens=thought_tokens[:, None],
            mixing_weight=weight[:, None, :, None],
        )

    def _starts(
        self, text: Text, past: int | Tensor, cached: bool | None, states: ThoughtStates | None
    ) -> Tensor | None:
        """Where documents begin among the keys of the cache and of ``text``, see :mod:`quietstar.models.documents`."""
        batch, length = text.shape
        find = first_key if states is None else states.first_key
        padding = find(text.attention_mask, (batch, past + length))
        mask = text.attention_mask
        if length == 1 or text.position_ids is None or (mask is not None and mask.dim() == 4):
            return padding
        packed = document_starts(None if mask is None else mask[:, -length:], text.position_ids, text.shape)
        if packed is None or packed.dim() == 1:
            return padding
        if cached:
            raise ValueError(
                f"position_ids must go up by one with use_cache or a {CACHE}, got packed documents: whoever reads the "
                "cache could not tell them apart"
            )
        return packed

    def _head_weight(self) -> Tensor:
        """The matrix of the head [V, H] for all ops of a pass: under autocast it is cast once for all of them."""
        return autocast_inputs(weight_of("lm_head", self.lm_head))[0]

    def _text_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V]; −inf for the thought tokens, which are never text."""
        logits = self.lm_head(hidden)
        for token in self.config.thought_token_ids:
            logits[..., token] = -torch.inf
        return logits

    def _thinker(
        self, base, anchors, anchor_positions, key_start, states=None, head=None, thought_length=None
    ) -> Thinker:  # fmt: skip
        """A thinker behind ``anchors`` [B, P], indices into the base keys, at ``anchor_positions`` [B, P]."""
        head = self._head_weight() if head is None else head
        thought_length = self.config.thought_length if thought_length is None else thought_length
        return Thinker(
            self.model, head, base, anchors, anchor_positions, self.start_embedding(), self.end_embedding(),
            thought_length, key_start, states,
        )  # fmt: skip

    def _base_mask(
        self, text: Tensor, attention_mask: Tensor | None, starts: Tensor | None, cache: Cache | None = None
    ) -> Tensor | None:
        """Mask [B, 1, L, keys] of the base rows; None is plain causal."""
        window = self.config.sliding_window
        if starts is not None and starts.dim() == 2:
            return packed_mask(starts, window)
        growing = text.shape[1] == 1 and starts is None and isinstance(cache, DynamicCache)
        if growing and (window is None or cache.get_seq_length() < window):
            return None  # a token sees all that the cache holds
        return base_mask(self.config, text, None if starts is None else attention_mask, cache)

    def _given_thoughts(self, thought_tokens: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Checked thought tokens [B, N, positions, k]."""
        flat = shape[0] * shape[1], *shape[2:]
        if tuple(thought_tokens.shape) not in (shape, flat):
            raise ValueError(f"thought_tokens must have shape {list(shape)}, got {list(thought_tokens.shape)}")
        self._check_tokens("thought_tokens", thought_tokens, self.config.vocab_size)
        return thought_tokens.reshape(shape)

    @staticmethod
    def _check_tokens(name: str, tokens: Tensor, vocab_size: int, ignore: int | None = None) -> None:
        check_tensor(name, tokens)
        check_integer(name, tokens)
        check_range(name, tokens if ignore is None else tokens.masked_fill(tokens == ignore, 0), 0, vocab_size - 1)


AutoConfig.register(QuietStarConfig.model_type, QuietStarConfig)
AutoModelForCausalLM.register(QuietStarConfig, QuietStarForCausalLM)
