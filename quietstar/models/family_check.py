"""A decoder that has learned to think, held to its own family: the same text and thought, the same predictions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quietstar.models.families import UnsupportedFamilyError
from quietstar.models.layouts import TextRows, ThoughtTree
from quietstar.models.modeling import ThinkingModel

_TEXT, _STEPS = 4, 4  # rows that are compared

# The most that logits may differ by, relative to their size: rounding, and less than any multiplier that matters.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_OF_HALVES = 0.05


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
    family = _with_parts_of(name, model)
    predictor = model.predictor()
    device = model.get_input_embeddings().weight.device
    tokens = torch.arange(_TEXT + _STEPS, device=device)[None] % config.vocab_size
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


def _with_parts_of(name: str, model: ThinkingModel) -> PreTrainedModel:
    """A model of the family with the decoder and head of ``model``, and nothing else."""
    config = model.config.text_config
    with torch.device("meta"):
        family = AutoModelForCausalLM.from_config(config)
    parts = {part for part, _ in family.named_children()}
    outside = {tensor for tensor in family.state_dict() if not tensor.startswith("model.")}
    if parts != {"model", "lm_head"} or outside != {"lm_head.weight"}:
        raise UnsupportedFamilyError(
            name, config, f"it must be made of model and lm_head, a matrix, got {', '.join(sorted(parts | outside))}"
        )
    family.model, family.lm_head = model.model, model.lm_head
    return family.eval()


@contextmanager
def _own_attention(config: PreTrainedConfig) -> Iterator[None]:
    """The attention that a family wrote down, on a decoder that has ours."""
    ours, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = ours


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """The difference of logits [1, rows, V] relative to their size, in the median row.

    Where rounding sends a row to other experts it may differ by more.
    """
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median())
