"""The model with ``generate``: transformers' own, plus options for drafts, when to think, and visible thoughts.

Plain thinking runs in transformers' loops, where every forward pass thinks once. The options run in the loop of
``decoding.py``, inside the same ``generate``: in both cases transformers prepares prompts, logits processors, stopping
criteria and streamers.
"""

import inspect
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils import CONFIG_NAME

from quietstar.models import checkpoint
from quietstar.models.cache import grow_in_place
from quietstar.models.card import write_card
from quietstar.models.configuration import QuietStarConfig
from quietstar.models.decoding import decode
from quietstar.models.defaults import DEFAULT, Think, choose
from quietstar.models.gain import require_gain_head
from quietstar.models.layouts import ThoughtStates
from quietstar.models.modeling import ThinkingModel
from quietstar.models.other_trainers import RefusesOtherTrainers
from quietstar.models.outputs import QuietStarGenerateOutput, ThoughtStreamer
from quietstar.models.speculation import Thinking
from quietstar.models.text import check_tokens
from quietstar.models.transformers_names import (
    ASSISTANTS_WORK,
    CACHE,
    CACHE_NAMES,
    GenerationHooks,
    UploadsOwnCard,
    keep_own_fields,
    only_cache,
    register,
)  # fmt: skip

# Arguments of transformers' ``generate`` with which a caller may keep a cache or other tensors created in the call.
_MAY_KEEP_A_CACHE = (
    CACHE, "assistant_model", "cache_implementation", "custom_generate", "generation_config", "return_dict_in_generate",
)  # fmt: skip

# Arguments of ``forward`` and of the methods below that have no meaning in ``generate``.
_NOT_OF_GENERATE = (
    "labels", "output_thought_entropy", "output_thought_logprobs", "suppress_thought_tokens", "thinking",
    "thought_states", "thought_tokens",
)  # fmt: skip


class QuietStarForCausalLM(RefusesOtherTrainers, GenerationHooks, UploadsOwnCard, ThinkingModel, GenerationMixin):
    """A causal language model with Quiet-STaR (arXiv 2403.09629): it thinks, hidden, after every token.

    Any decoder whose attention goes through transformers' AttentionInterface can think;
    :data:`~quietstar.models.families.FAMILIES` lists those that are tested.

    >>> model = QuietStarForCausalLM.from_base("a checkpoint", tokenizer=tokenizer)
    >>> model(input_ids, labels=input_ids).loss.backward()   # train
    >>> model.generate(input_ids, max_new_tokens=20)         # generate, thinking before every token
    >>> model.generate(input_ids, draft_length=8)            # same distribution of texts, faster
    """

    from_base = classmethod(checkpoint.from_base)
    from_pretrained = classmethod(checkpoint.from_pretrained)

    def save_pretrained(self, save_directory: str | PathLike, is_main_process: bool = True, *args, **kwargs) -> None:
        """Save as transformers does, with a model card, ``README.md``, unless somebody wrote one."""
        keep_own_fields(self.generation_config)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process and (Path(save_directory) / CONFIG_NAME).is_file():  # else it holds an adapter
            self.write_card(save_directory)

    def write_card(self, folder: str | PathLike, tags: Sequence[str] = ()) -> None:
        write_card(folder, self, tags=list(tags))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Do nothing: a saved folder refers to the installed package and holds no copy of the class."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args,
        draft_length: int | Literal["auto", "default"] | None = DEFAULT,
        think: Think | Literal["default"] = DEFAULT,
        gain_threshold: float | Literal["default"] = DEFAULT,
        return_thoughts: bool = False,
        thoughts: Literal["own", "shuffled", "random"] | Tensor = "own",
        **kwargs,
    ) -> Tensor | QuietStarGenerateOutput:
        """Generate text, thinking before every token. Other arguments are those of transformers' ``generate``.

        Args:
            inputs: int64 [B, L], the prompts (or ``input_ids``), padded on the left.
            draft_length: number of tokens that the base model drafts. The model then thinks after all of them at once
                and keeps those it agrees with (speculative sampling, arXiv 2211.17192, with the model as its own
                drafter). Drafts change neither greedy text nor the distribution of sampled text. ``"auto"`` adapts the
                length to how many drafts were accepted so far; None turns drafting off.
            think: ``"always"``; ``"never"``, for the base model alone; a threshold in nats, to think only before tokens
                whose base prediction has more entropy; or ``"learned"``, to think only where the model's gain head
                (trained with a ``gain_weight``) expects a thought to gain more than ``gain_threshold``. ``"default"``,
                also for ``draft_length``, takes the value of the call's or the model's generation config, or else of
                the model's configuration; if none sets it, ``"always"`` (for ``draft_length`` None).
            gain_threshold: in nats, with ``think="learned"``. ``"default"`` works as for ``think``; if nothing sets it,
                0.1. At 0, a head that is right up to noise thinks at half of the positions where nothing is gained.
            return_thoughts: whether to return a ``QuietStarGenerateOutput`` with every thought. With one of the other
                options, ``return_dict_in_generate`` returns one too, without the thoughts.
            thoughts: the thoughts before the new tokens. ``"own"``: the model's own. A tensor of given thoughts: int64
                [B, k], the same before every token, or [B, n, k], one before each of at most n new tokens; −1 for no
                thought (and after the end of a thought of learned length). ``thought_tokens`` of an earlier call thus
                reproduce its greedy text. All returned sequences of a prompt get the same thoughts.
                As a control, ``"shuffled"``: every prompt gets the thoughts of the next prompt in the batch at the same
                step, and the last prompt those of the first. (A text that has ended goes on thinking after its last
                token.) As another, ``"random"``: tokens drawn uniformly from the vocabulary, anew before every token.

        Logits processors and stopping criteria may keep a state, as grammar engines do: each is called once per token,
        in order. To drafts, only those of transformers' processors that keep no state are applied.

        Raises:
            TypeError, ValueError: an option is invalid or an argument unknown; a prompt is empty, longer than the
                model's positions or padded on the right; ``output_attentions`` or ``assistant_early_exit`` is set; one
                of the four options is combined with beam search, assistants, a cache, ``custom_generate``,
                ``guidance_scale``, ``synced_gpus``, or scores, logits or hidden states in the output.
        """
        if args:
            kwargs |= inspect.signature(super().generate).bind_partial(inputs, *args).arguments
            kwargs.pop("inputs", None)
        sources = kwargs.get("generation_config"), self.generation_config, self.config
        think, draft_length = choose("think", think, *sources), choose("draft_length", draft_length, *sources)
        if think == "learned":
            require_gain_head(self.gain_head, self.config)
        elif gain_threshold != DEFAULT:
            raise ValueError(f"think must be 'learned' with gain_threshold {gain_threshold!r}, got {think!r}")
        threshold = choose("gain_threshold", gain_threshold, *sources)
        thinking = Thinking(draft_length, think, threshold, return_thoughts, thoughts)
        self._check_prompt(kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("attention_mask"))
        if (cache := only_cache(*(kwargs.pop(name, None) for name in CACHE_NAMES))) is not None:
            kwargs[CACHE] = cache
        self._check_arguments(kwargs, thinking)
        if thinking.plain:
            # Calls are faster in inference mode, but a cache created in it could not be used outside.
            kept = any(
                kwargs.get(name) is not None or getattr(self.generation_config, name, None)
                for name in _MAY_KEEP_A_CACHE
            )
            with torch.inference_mode(not kept):
                output = super().generate(inputs, **kwargs)
            return output.clone() if isinstance(output, Tensor) and output.is_inference() else output
        return super().generate(inputs, thinking=thinking, **kwargs)

    def prepare_inputs_for_generation(self, *args, inputs_embeds=None, thinking: Thinking | None = None, **kwargs):
        """Prepare inputs as transformers does (it looks for ``inputs_embeds`` here) and suppress thought tokens."""
        kwargs.pop("tokenizer", None)  # for ``stop_strings``; transformers leaves it among the arguments of forward
        inputs = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        return inputs | {"suppress_thought_tokens": True}

    def create_masks_for_generate(self, attention_mask: Tensor | None, **_) -> Tensor | None:
        """Return, for compileable caches, where each prompt begins: [B], a shape that does not grow with the text."""
        return None if attention_mask is None else attention_mask.bool().to(torch.int64).argmax(dim=1)

    def on_new_cache(self, cache: Cache) -> None:
        grow_in_place(cache)

    def sample(self, input_ids, *args, thinking: Thinking | None = None, **kwargs):
        states = self._new_states(input_ids, kwargs.get("attention_mask"))
        if thinking is None:
            return super().sample(input_ids, *args, thought_states=states, **kwargs)
        return decode(self, input_ids, *args, thinking=thinking, **kwargs)

    def beam_search(self, input_ids, *args, thinking: Thinking | None = None, **kwargs):
        self._only_without_options(thinking, "beam search", "num_beams must be 1")
        states = self._new_states(input_ids, kwargs.get("attention_mask"))
        return super().beam_search(input_ids, *args, thought_states=states, **kwargs)

    def assisted_decoding(self, input_ids, *args, thinking: Thinking | None = None, **kwargs):
        self._only_without_options(thinking, "assisted decoding", "assistant_model and prompt lookup must be left out")
        states = self._new_states(input_ids, kwargs.get("attention_mask"))
        return super().assisted_decoding(input_ids, *args, thought_states=states, **kwargs)

    def for_assistant(self, arguments: dict) -> dict:
        return {name: value for name, value in arguments.items() if name != "thought_states"}

    @staticmethod
    def _only_without_options(thinking: Thinking | None, mode: str, demand: str) -> None:
        if thinking is not None:
            raise ValueError(f"{demand} with {thinking.options}, got {mode}")

    def _check_arguments(self, arguments: dict, thinking: Thinking) -> None:
        """Refuse arguments that would be ignored or fail in the middle of generation."""

        def asked(name: str):
            sources = arguments.get("generation_config"), self.generation_config
            values = (arguments.get(name), *(getattr(source, name, None) for source in sources))
            return next((value for value in values if value is not None), None)

        wrong = [name for name in _NOT_OF_GENERATE if arguments.get(name) is not None]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} must be left out of generate()")
        if asked("output_attentions") or self.config.output_attentions:
            raise ValueError("output_attentions must be False: attention is fused and has no weights to give")
        if (layers := asked("assistant_early_exit")) is not None:
            raise ValueError(
                f"assistant_early_exit must be None, got {layers}: with draft_length the model drafts for itself"
            )
        if arguments.get("assistant_model") is not None and not ASSISTANTS_WORK:
            raise ValueError("assistant_model must be None before transformers 5.18, which fails on rejected drafts")
        if isinstance(arguments.get("streamer"), ThoughtStreamer) and not thinking.return_thoughts:
            raise ValueError("return_thoughts must be True with a ThoughtStreamer, got False")
        for name in () if thinking.plain else (CACHE, "custom_generate"):
            if (value := arguments.get(name)) is not None:
                raise ValueError(f"{name} must be None with {thinking.options}, got {type(value).__name__}")

    @staticmethod
    def _new_states(input_ids: Tensor, attention_mask: Tensor | None) -> ThoughtStates:
        """Create states that know where prompts begin, even if prompts are read in pieces that begin with padding.

        Raises:
            ValueError: there is right padding. New text follows the last column, so padding would become part of it.
        """
        states = ThoughtStates()
        if attention_mask is None or attention_mask.dim() > 2:
            return states
        rows = (attention_mask[:, -1] == 0).nonzero().flatten().tolist()
        if rows:
            raise ValueError(
                f"attention_mask must pad prompts on the left in generate(), got 0 at the end of rows {rows}"
            )
        if attention_mask.shape == input_ids.shape:
            states.first_key(attention_mask, input_ids.shape)
        return states

    def _check_prompt(self, prompt: object, attention_mask: Tensor | None) -> None:
        if not isinstance(prompt, Tensor) or prompt.dim() != 2:
            return  # transformers raises the error
        if prompt.shape[1] == 0:
            raise ValueError(f"input_ids must hold at least one token per prompt, got shape {list(prompt.shape)}")
        check_tokens("input_ids", prompt, self.config.vocab_size)
        positions = self.config.max_position_embeddings
        if prompt.shape[1] > positions:
            longest = prompt.shape[1] if attention_mask is None else int(attention_mask.sum(dim=-1).max())
            if longest > positions:
                raise ValueError(
                    f"input_ids must have at most max_position_embeddings = {positions} tokens, got {longest}"
                )


register(QuietStarConfig, QuietStarForCausalLM)
