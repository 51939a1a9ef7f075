"""The transformers model: a decoder of any family that thinks after every position."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache

from quietstar.models.configuration import QuietStarConfig
from quietstar.models.decoder import Decoder, HiddenStates
from quietstar.models.documents import document_starts
from quietstar.models.families import new_decoder, positions_of_short_texts
from quietstar.models.layers import GainHead, MixingHead, ThoughtAlone, ThoughtEmbedding, ZeroLinear
from quietstar.models.layouts import ATTENTION_NAME, ThoughtStates
from quietstar.models.lengths import cut_thoughts
from quietstar.models.objective import Given
from quietstar.models.outputs import QuietStarOutput
from quietstar.models.predictor import Predictor
from quietstar.models.text import Text, check_left_out, check_tokens
from quietstar.models.transformers_names import CACHE, LeftByQuantisers, only_cache


class ThinkingModel(LeftByQuantisers, PreTrainedModel):
    """A decoder with Quiet-STaR; the subclass ``QuietStarForCausalLM`` adds ``generate``.

    Whatever its family, the decoder is the submodule ``model``, and its tensors keep their names.
    """

    config_class = QuietStarConfig
    config: QuietStarConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    # The loss is a sum of means over different sets of tokens, so gradient accumulation averages the micro-batches.
    accepts_loss_kwargs = False

    def __init__(self, config: QuietStarConfig):
        config.check()
        super().__init__(config)
        text = config.text_config
        text._attn_implementation = ATTENTION_NAME
        self.model = new_decoder(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.start_embedding = ThoughtEmbedding(text.hidden_size, config.embedding_scale)
        self.end_embedding = ThoughtEmbedding(text.hidden_size, config.embedding_scale)
        self.mixing_head = MixingHead(text.hidden_size) if config.prediction == "mixed" else ThoughtAlone()
        self.gain_head = GainHead(text.hidden_size) if config.gain_weight > 0 else None
        self._positions = positions_of_short_texts(text)
        self._can_compile_fullgraph = self.model._can_compile_fullgraph
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, ThoughtEmbedding):
            init.normal_(module.weight, std=self.config.initializer_range / module.scale)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Return our own attention, the only one that supports thoughts; any other request is an error."""
        if requested_attention not in (None, ATTENTION_NAME):
            raise ValueError(f"attn_implementation must be None or {ATTENTION_NAME!r}, got {requested_attention!r}")
        return ATTENTION_NAME

    def predictor(self) -> Predictor:
        """Return the current parts of the model, for one pass or for several as long as no parameter changes."""
        decoder = Decoder(self.model, self._positions)
        return Predictor(
            self.config, decoder, self.lm_head, self.start_embedding, self.end_embedding, self.mixing_head,
            self.gain_head,
        )  # fmt: skip

    def _predictor_of(self, states: ThoughtStates | None) -> Predictor:
        """Return a predictor that is created once for all tokens of a call of ``generate``."""
        if states is None or torch.compiler.is_compiling():
            return self.predictor()
        if states.parts is None:
            states.parts = self.predictor()
        return states.parts

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
        anchors: Tensor | None = None,
        baseline_nll: Tensor | None = None,
        teacher_logprobs: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        thought_lengths: Tensor | None = None,
    ) -> QuietStarOutput | tuple:
        """Think after every position and predict.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L] ([B, cached + L] with a cache), 1 for tokens, 0 for left or right padding.
            position_ids: int64 [B, L] or [1, L]; default 0..L−1, continuing after the cache. Where a position is not
                one more than the previous one, a new document begins, which does not see earlier documents.
            past_key_values, cache: the base cache, under its old and its new name; inference only.
            labels: int64 [B, L], usually ``input_ids``; −100, padding and the first token of every document are
                ignored. With labels, the output holds the loss and its parts but no logits; without, the mixed logits.
            use_cache: whether to return the base cache; inference only.
            logits_to_keep: inference only: think and predict only at the last ``logits_to_keep`` positions (0: all), or
                at the positions listed in a 1-D tensor.
            thought_tokens: int64 [B, N, L, k] (or [B·N, L, k]; without labels [B, 1, K, k] for K kept positions):
                thoughts to use instead of sampling them. Thoughts of learned length are −1 after their end.
            output_thought_logprobs: with labels: whether to return ``thought_logprobs``. Without them a training step
                is a few per cent faster, because thoughts that did not help need no logits.
            suppress_thought_tokens: whether the start and end token get logit −inf, as in ``generate``.
            thought_states: inference only: state that ``generate`` keeps from one thought to the next.
            inputs_embeds: [B, L, H], embeddings of the text instead of ``input_ids``.
            output_hidden_states: whether to return the hidden states of the base pass: [B, L, H] after the embedding
                and after each layer, the last one normalised. A list selects some of them; the others are None.
            output_attentions: must be left out, since no attention probabilities are kept.
            output_thought_entropy: with labels: whether to return ``thought_entropy``; costs about one per cent of a
                step.
            anchors: int64 [B, A], with labels: the positions that think, −1 for none; thoughts are then [B, N, A, k].
                Default: chosen by ``anchors_per_text`` and ``anchor_choice`` of the configuration.
            baseline_nll: float [B, L−1], with labels and the baseline "teacher": the result of its ``base_nll``.
            teacher_logprobs: float [B, N, A, k], with labels and a ``kl_weight``: the teacher's ``thought_logprobs`` of
                the same thoughts.
            old_logprobs: likewise for the model that sampled the thoughts, with labels and a ``clip_ratio``. Default:
                those of this pass.
            thought_lengths: int64 [B, N, L], or the shape of the accompanying ``thought_tokens`` without its last
                dimension: the number of tokens of each thought, 1 to k, or 0 for no anchor. Replaces −1 after the end.
            return_dict: False returns a tuple of the values that are not None.

        Raises:
            TypeError, ValueError: an argument is invalid; the message names it.
        """
        cache = only_cache(past_key_values, cache)
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions must be False: attention probabilities are never held as a whole")
        text = Text.of(input_ids, inputs_embeds, attention_mask, position_ids)
        if thought_states is None and input_ids is not None:  # ``generate`` has already checked its prompt
            check_tokens("input_ids", input_ids, self.config.vocab_size)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        collect = None if output_hidden_states is False else HiddenStates(text.shape[1])
        if thought_lengths is not None:
            thought_tokens = cut_thoughts(thought_tokens, thought_lengths, self.config)
        if labels is None:
            check_left_out(
                "without labels", anchors=anchors, baseline_nll=baseline_nll, teacher_logprobs=teacher_logprobs,
                old_logprobs=old_logprobs,
            )  # fmt: skip
            checkpointing = getattr(self.model, "gradient_checkpointing", False)
            recomputed = checkpointing and self.training and torch.is_grad_enabled()
            output = self._predictor_of(thought_states).predict(
                text, cache, use_cache, logits_to_keep, thought_tokens, suppress_thought_tokens, thought_states,
                collect, recomputed,
            )  # fmt: skip
        elif cache is not None:
            raise ValueError(f"{CACHE} must be None with labels, got {type(cache).__name__}")
        else:
            given = Given(baseline_nll, teacher_logprobs, old_logprobs)
            output = self.predictor().train(
                text, labels, thought_tokens, anchors, given, output_thought_logprobs, output_thought_entropy, collect
            )  # fmt: skip
        if collect is not None:
            chosen = range(len(collect.states))
            if output_hidden_states is not True:
                chosen = {chosen[i] for i in output_hidden_states}
            output.hidden_states = tuple(states if i in chosen else None for i, states in enumerate(collect.states))
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    @torch.no_grad()
    def base_nll(
        self,
        input_ids: Tensor | None,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Compute the nll of the text without thoughts. A teacher's result is a student's ``baseline_nll``.

        Args:
            input_ids, labels, attention_mask, position_ids, inputs_embeds: as in ``forward``.

        Returns:
            float [B, L−1], −log p of token i+1 in nats; 0 where there is no label.
        """
        text = Text.of(input_ids, inputs_embeds, attention_mask, position_ids)
        return self.predictor().base_nll(text, labels)

    @torch.no_grad()
    def choose_anchors(
        self,
        input_ids: Tensor | None,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | None:
        """Choose the positions that think in training, according to the configuration: int64 [B, A], or None for all.

        Args:
            input_ids, labels, attention_mask, position_ids, inputs_embeds: as in ``forward``.
        """
        text = Text.of(input_ids, inputs_embeds, attention_mask, position_ids)
        return self.predictor().chosen_anchors(text, labels)

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
        """Sample thoughts after positions of a text.

        Args:
            input_ids, attention_mask, position_ids: as in ``forward``.
            anchors: int [P] or [B, P], the positions that think, once each; −1 is inactive. Default: every position
                thinks ``config.num_thoughts`` times.
            temperature: sampling temperature; 0 is greedy. Default: ``config.thought_temperature``.
            generator: source of the seeds, on the model's device. Default: torch's global generator.

        Returns:
            int64 [B, N, L, k], or [B, P, k] for given anchors (−1 for inactive ones); −1 after the end of a thought.
        """
        text = Text.of(input_ids, None, attention_mask, position_ids)
        check_tokens("input_ids", input_ids, self.config.vocab_size)
        starts = document_starts(attention_mask, position_ids, text.shape)
        if anchors is None:
            return self.predictor().thoughts_everywhere(text, starts, temperature, generator)
        anchors = anchors.expand(len(input_ids), -1).clamp_min(-1)
        tokens = self.predictor().thoughts_behind(text, starts, anchors, temperature, generator)
        return tokens.masked_fill(anchors[..., None] < 0, -1)
