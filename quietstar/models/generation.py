"""Generation with the thoughts in view."""

from typing import NamedTuple

from torch import Tensor, stack

from quietstar.models.modeling import QuietStarForCausalLM, QuietStarOutput


class GenerationWithThoughts(NamedTuple):
    """Generated text and the thought in front of each new token; n new tokens, k tokens per thought."""

    sequences: Tensor  # int64 [B, L + n]
    thought_tokens: Tensor  # int64 [B, n, k]
    mixing_weight: Tensor  # [B, n], weight of the prediction after the thought


def generate_with_thoughts(model: QuietStarForCausalLM, input_ids: Tensor, **options) -> GenerationWithThoughts:
    """``model.generate``, keeping every thought.

    Args:
        model: the model.
        input_ids: int64 [B, L], the prompts.
        options: arguments of ``generate``.

    Raises:
        ValueError: beam search, where a thought does not stay with its text.
    """
    if options.get("num_beams", 1) != 1:
        raise ValueError(f"num_beams must be 1 to keep thoughts, got {options['num_beams']}")
    steps: list[QuietStarOutput] = []
    hook = model.register_forward_hook(lambda _module, _inputs, output: steps.append(output))
    try:
        sequences = model.generate(input_ids, **options, return_dict_in_generate=False)
    finally:
        hook.remove()
    return GenerationWithThoughts(
        sequences,
        stack([step.thought_tokens[:, 0, -1] for step in steps], dim=1),
        stack([step.mixing_weight[:, 0, -1, 0] for step in steps], dim=1),
    )
