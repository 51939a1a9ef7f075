"""Whether a decoder can think: what it is made of, and whether its predictions stay those of its family."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quietstar.models.families import UnsupportedFamilyError, refuse_sinks, unsupported
from quietstar.models.layouts import TextRows, ThoughtTree
from quietstar.models.modeling import ThinkingModel

_TEXT, _STEPS = 4, 2  # tokens of the text, and of each thought
_ANCHORS = (1, 3)  # between them they tell a layout from plain causal attention

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
    refuse_sinks(name, family)
    parts = {part for part, _ in family.named_children()}
    outside = {tensor for tensor in family.state_dict() if not tensor.startswith("model.")}
    if odd := sorted(parts ^ {"model", "lm_head"}) or sorted(outside ^ {"lm_head.weight"}):
        raise UnsupportedFamilyError(
            name, config, f"it must be made of 'model' and 'lm_head', which is a matrix, but for {', '.join(odd)}"
        )


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
    text, thought = predictor.decoder.embed(tokens).split([_TEXT, _STEPS], dim=1)
    anchors = torch.tensor(_ANCHORS, device=device)
    columns, steps = torch.arange(_TEXT, device=device), torch.arange(1, _STEPS + 1, device=device)
    rows = torch.cat([text, *[thought] * len(_ANCHORS)], dim=1)
    positions = torch.cat([columns, (anchors[:, None] + steps).flatten()])[None]
    try:
        hidden = predictor.decoder(rows, positions, ThoughtTree(TextRows(columns[None]), anchors))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # masks that fit nothing, keywords that are not handed on
        raise UnsupportedFamilyError(name, config, str(error)) from error
    ours = predictor.logits(hidden).float()
    with _own_attention(config):
        alone = [
            family(inputs_embeds=torch.cat([text[:, : anchor + 1], thought], dim=1), use_cache=False).logits[0]
            for anchor in _ANCHORS
        ]
    theirs = [alone[-1][:_TEXT], *(logits[-_STEPS:] for logits in alone)]
    parts = zip(ours[0].split([len(rows) for rows in theirs]), theirs, strict=True)
    difference = max(_relative(actual, expected.float().to(actual.device)) for actual, expected in parts)
    if difference > _TOLERANCE.get(rows.dtype, _TOLERANCE_OF_HALVES):
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
    """The difference of logits [rows, V] relative to their size; 0 where theirs are not finite, with bad weights.

    Of median rows: where rounding sends one to other experts it may differ by more.
    """
    if not bool(theirs.isfinite().all()):
        return 0.0
    difference = float((ours - theirs).norm(dim=-1).median() / theirs.norm(dim=-1).median())
    return math.inf if math.isnan(difference) else difference
