"""Checks whether a decoder can think, by its configuration and by comparing its predictions with its family's."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quietstar.models.decoder import Decoder
from quietstar.models.families import UnsupportedFamilyError, refuse_sinks, unsupported
from quietstar.models.layouts import BaseAndThoughts, BaseStates, TextRows, ThoughtCache, ThoughtTree
from quietstar.models.modeling import ThinkingModel

_TEXT, _STEPS = 4, 2  # tokens of the text, and of each thought
_ANCHORS = (1, 3)  # with two anchors, a thought layout differs from plain causal attention

# Largest relative difference of logits: it covers rounding, but no multiplier that matters.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_OF_HALVES = 0.05


def check_decoder(name: str, config: PreTrainedConfig) -> None:
    """Refuse a decoder that cannot think according to its configuration.

    Args:
        name: name of the argument that the configuration came from.
        config: the decoder's configuration.

    Raises:
        UnsupportedFamilyError: the decoder cannot think; the message says why, and lists those that can.
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
    """Compare a model's predictions with those of its family's own code on a few tokens, including a thought.

    This tests multipliers, soft caps and layers from the outside, so that an unknown family is not silently wrong.

    Args:
        name: name of the argument that the model came from.
        model: the model, in evaluation mode. During the check the family's own attention runs.

    Raises:
        UnsupportedFamilyError: the predictions or the tensors differ.
    """
    config = model.config.text_config
    predictor = model.predictor()
    decoder, device = predictor.decoder, model.get_input_embeddings().weight.device
    tokens = torch.arange(1, _TEXT + _STEPS + 1, device=device)[None] % config.vocab_size
    text, thought = decoder.embed(tokens).split([_TEXT, _STEPS], dim=1)
    anchors = torch.tensor(_ANCHORS, device=device)
    try:
        parts = _in_one_pass(decoder, text, thought, anchors), _step_by_step(decoder, text, thought, anchors)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # the dummy mask was used, or the layout was not passed on
        raise UnsupportedFamilyError(name, config, str(error)) from error
    family = family_of(model).eval()
    with _own_attention(config):
        alone = [
            family(inputs_embeds=torch.cat([text[:, : anchor + 1], thought], dim=1), use_cache=False).logits[0]
            for anchor in _ANCHORS
        ]
    theirs = [alone[-1][:_TEXT], *(logits[-_STEPS:] for logits in alone)]
    for hidden in parts:
        ours = predictor.logits(hidden).split([len(rows) for rows in theirs])
        difference = max(map(_relative, ours, theirs))
        if difference > _TOLERANCE.get(text.dtype, _TOLERANCE_OF_HALVES):
            raise UnsupportedFamilyError(
                name, config, f"its own logits differ from those of a thinking model by {difference:.2g} of their size"
            )


def _in_one_pass(decoder: Decoder, text: Tensor, thought: Tensor, anchors: Tensor) -> Tensor:
    """Compute hidden states [rows, H] of the text and of the thought after each anchor in one pass, as in training."""
    columns, steps = (torch.arange(count, device=anchors.device) for count in (_TEXT, _STEPS))
    rows = torch.cat([text, *[thought] * len(anchors)], dim=1)
    positions = torch.cat([columns, (anchors[:, None] + 1 + steps).flatten()])[None]
    return decoder(rows, positions, ThoughtTree(TextRows(columns[None]), anchors))[0]


def _step_by_step(decoder: Decoder, text: Tensor, thought: Tensor, anchors: Tensor) -> Tensor:
    """Compute the same with the first steps in the text's pass and the others later, as when thoughts are sampled."""
    columns = torch.arange(_TEXT, device=anchors.device)
    base = BaseStates(TextRows(columns[None]))
    cache = ThoughtCache(base, anchors, _STEPS)
    layout, rows, positions, hidden = BaseAndThoughts(base, _TEXT, cache), text, columns, []
    for step in range(_STEPS):
        rows = torch.cat([rows, thought[:, step : step + 1].expand(-1, len(anchors), -1)], dim=1)
        positions = torch.cat([positions, anchors + 1 + step])
        hidden.append(decoder(rows, positions[None], layout)[0])
        cache.steps += 1
        layout, rows, positions = cache, rows[:, :0], positions[:0]
    steps = torch.stack([states[-len(anchors) :] for states in hidden], dim=1)  # [P, S, H]
    return torch.cat([hidden[0][:_TEXT], steps.flatten(0, 1)])


def family_of(model: ThinkingModel) -> PreTrainedModel:
    """Create the family's own model from the decoder and the head of ``model``; the attention stays ours."""
    family = _without_weights(model.config.text_config)
    family.model, family.lm_head = model.model, model.lm_head
    return family


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """Create the family's own model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@contextmanager
def _own_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Use the family's own attention, inside the context, on a decoder that has ours."""
    ours, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = ours


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the relative difference of logits [rows, V]; 0 if theirs are not finite because of bad weights.

    It is that of a median row, since rounding may send single rows to other experts, which changes them more.
    """
    if not bool(theirs.isfinite().all()):
        return 0.0
    ours, theirs = ours.float(), theirs.float().to(ours.device)
    difference = float((ours - theirs).norm(dim=-1).median() / theirs.norm(dim=-1).median())
    return math.inf if math.isnan(difference) else difference
