"""``generate`` of a Quiet-STaR model: transformers' own, and beyond it drafts, when to think, and visible thoughts.

Plain thinking runs in transformers' loops, where every forward pass thinks once. The options run in the loop of
``decoding.py``, inside the same ``generate``: transformers prepares prompts, logits processors, stopping criteria and
streamers either way.
"""

from typing import Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from quietstar.models.attention import ThoughtStates
from quietstar.models.cache import grow_in_place
from quietstar.models.decoding import decode
from quietstar.models.generation_output import QuietStarGenerateOutput, ThoughtStreamer
from quietstar.models.speculation import Thinking
from quietstar.models.transformers_names import CACHE, CACHE_NAMES, GenerationHooks, only_cache

# Arguments of transformers' ``generate`` with which the caller, or the model from call to call, may keep a cache.
_MAY_KEEP_A_CACHE = (CACHE, "cache_implementation", "generation_config", "return_dict_in_generate")


class ThinkingGeneration(GenerationHooks):
    """Mixin in front of a transformers model: the options of :meth:`generate`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args,
        draft_length: int | Literal["auto"] | None = None,
        think: float | Literal["always", "never"] = "always",
        return_thoughts: bool = False,
        **kwargs,
    ) -> Tensor | QuietStarGenerateOutput:
        """Generate text, thinking before every token. Other arguments are those of transformers' ``generate``.

        Args:
            inputs: int64 [B, L], the prompts (or ``input_ids``), padded on the left.
            draft_length: the base model drafts so many tokens, the model thinks behind all of them at once and keeps
                those it agrees with (speculative sampling, arXiv 2211.17192, with the model as its own drafter). The
                text is distributed as without drafts, greedy text is the same. ``"auto"`` chooses the length from how
                many drafts were accepted so far; None drafts nothing.
            think: ``"always"``; ``"never"`` for the base model alone; or a threshold in nats: think only in front of
                tokens whose base prediction has more entropy.
            return_thoughts: return a :class:`QuietStarGenerateOutput` with every thought. So does
                ``return_dict_in_generate`` with ``draft_length`` or ``think``, without the thoughts.

        Raises:
            TypeError, ValueError: a bad option, an empty prompt or one longer than the model's positions; with one of
                the three options also beam search, a cache, ``guidance_scale``, ``synced_gpus`` and scores,
                logits, attentions or hidden states in the output.
        """
        thinking = Thinking(draft_length, think, return_thoughts)
        self._check_prompt(kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("attention_mask"))
        if isinstance(kwargs.get("streamer"), ThoughtStreamer) and not return_thoughts:
            raise ValueError("return_thoughts must be True with a ThoughtStreamer, got False")
        if (cache := only_cache(*(kwargs.pop(name, None) for name in CACHE_NAMES))) is not None:
            kwargs[CACHE] = cache
        if thinking.plain:
            # Calls cost less in inference mode, but a cache made in it could not be used outside of it.
            kept = any(
                kwargs.get(name) is not None or getattr(self.generation_config, name, None)
                for name in _MAY_KEEP_A_CACHE
            )
            with torch.inference_mode(not args and not kept):
                output = super().generate(inputs, *args, thought_states=ThoughtStates(), **kwargs)
            return output.clone() if isinstance(output, Tensor) and output.is_inference() else output
        if cache is not None:
            raise ValueError(
                f"{CACHE} must be None with draft_length, think or return_thoughts, got {type(cache).__name__}"
            )
        return super().generate(inputs, *args, thinking=thinking, **kwargs)

    def prepare_inputs_for_generation(self, *args, inputs_embeds=None, thinking: Thinking | None = None, **kwargs):
        """As in transformers, which looks for ``inputs_embeds`` here; the thought tokens are never generated."""
        inputs = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        return inputs | {"suppress_thought_tokens": True}

    def on_new_cache(self, cache: Cache) -> None:
        grow_in_place(cache)

    def sample(self, input_ids, *args, thinking: Thinking | None = None, **kwargs):
        if thinking is None:
            return super().sample(input_ids, *args, **kwargs)
        return decode(self, input_ids, *args, thinking=thinking, **kwargs)

    def beam_search(self, *args, thinking: Thinking | None = None, **kwargs):
        self._only_without_options(thinking, "beam search", "num_beams must be 1")
        return super().beam_search(*args, **kwargs)

    def assisted_decoding(self, *args, thinking: Thinking | None = None, **kwargs):
        self._only_without_options(thinking, "assisted decoding", "assistant_model and prompt lookup must be left out")
        return super().assisted_decoding(*args, **kwargs)

    @staticmethod
    def _only_without_options(thinking: Thinking | None, mode: str, demand: str) -> None:
        if thinking is not None:
            raise ValueError(f"{demand} with draft_length, think or return_thoughts, got {mode}")

    def _check_prompt(self, prompt: object, attention_mask: Tensor | None) -> None:
        if not isinstance(prompt, Tensor) or prompt.dim() != 2:
            return  # transformers says what is wrong with it
        if prompt.shape[1] == 0:
            raise ValueError(f"input_ids must hold at least one token per prompt, got shape {list(prompt.shape)}")
        self._check_tokens("input_ids", prompt, self.config.vocab_size)
        positions = self.config.max_position_embeddings
        if prompt.shape[1] > positions:
            longest = prompt.shape[1] if attention_mask is None else int(attention_mask.sum(dim=-1).max())
            if longest > positions:
                raise ValueError(
                    f"input_ids must have at most max_position_embeddings = {positions} tokens, got {longest}"
                )
