"""Whether a decoder can think: what it is made of, and whether its predictions stay those of its family."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quietstar.models.families import UnsupportedFamilyError, unsupported
from quietstar.models.layouts import TextRows, ThoughtTree
from quietstar.models.modeling import ThinkingModel

_TEXT, _STEPS = 4, 4  # rows that are compared

# The most that logits may differ by, relative to their size: rounding, and less than any multiplier that matters.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_OF_HALVES = 0.05


def check_decoder(name: str, config: PreTrainedConfig) -> None:
    """Refuse a decoder that cannot think, as far as its configuration tells.

    Args:
        name: of the argument that the configuration came from.
        config: of the decoder.

    Raises:
        UnsupportedFamilyError: the reason, and which can.
    """
    if (reason := unsupported(config)) is not None:
        raise UnsupportedFamilyError(name, config, reason)
    family = _without_weights(config)
    parts = {part for part, _ in family.named_children()}
    outside = {tensor for tensor in family.state_dict() if not tensor.startswith("model.")}
    if parts != {"model", "lm_head"} or outside != {"lm_head.weight"}:
        made_of = ", ".join(sorted(parts | outside))
        raise UnsupportedFamilyError(name, config, f"it is made of more than model and lm_head.weight: {made_of}")


@torch.no_grad()
def check_family(name: str, model: ThinkingModel) -> None:
    """Compare a model with its family on a few tokens, among them a thought.

    What a family does with its hidden states (multipliers, soft caps) and its layers is looked at from the outside, so
    that one which is not known is not silently wrong.

    Args:
        name: of the argument that the model came from.
        model: in evaluation mode; attention of the family's own runs while this lasts.

    Raises:
        UnsupportedFamilyError: the predictions or the tensors differ.
    """
    config = model.config.text_config
    family = _without_weights(config).eval()
    family.model, family.lm_head = model.model, model.lm_head
    predictor = model.predictor()
    device = model.get_input_embeddings().weight.device
    tokens = torch.arange(1, _TEXT + _STEPS + 1, device=device)[None] % config.vocab_size
    rows = predictor.decoder.embed(tokens)
    columns = torch.arange(_TEXT, device=device)[None]
    tree = ThoughtTree(TextRows(columns), torch.tensor([_TEXT - 1], device=device))
    try:
        hidden = predictor.decoder(rows, torch.arange(_TEXT + _STEPS, device=device)[None], tree)
    except ValueError as error:
        raise UnsupportedFamilyError(name, config, str(error)) from error
    ours = predictor.logits(hidden).float()
    with _own_attention(config):
        theirs = family(inputs_embeds=rows, use_cache=False).logits.float()
    difference = _relative(ours.to(theirs.device), theirs)
    if not difference <= _TOLERANCE.get(rows.dtype, _TOLERANCE_OF_HALVES):
        raise UnsupportedFamilyError(
            name, config, f"its own logits differ from those of a thinking model by {difference:.2g} of their size"
        )


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The family's own model."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@contextmanager
def _own_attention(config: PreTrainedConfig) -> Iterator[None]:
    """The attention that a family wrote down, on a decoder that has ours."""
    ours, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = ours


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """The difference of logits [1, rows, V] relative to their size.

    Of median rows: where rounding sends one to other experts it may differ by more.
    """
    return float((ours - theirs).norm(dim=-1).median() / theirs.norm(dim=-1).median())
