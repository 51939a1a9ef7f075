"""Fields of the configuration: what makes no sense is refused by name."""

import math

import pytest
from transformers import Olmo3Config

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.models.configuration import CHOICES, INTERVALS, OPTIONAL_INTERVALS, SWITCHES

INTEGERS = {"thought_length": 0, "lookahead": 1, "num_thoughts": 1, "policy_updates": 1}
OUTSIDE = {
    "thought_temperature": -0.1, "policy_temperature": 0, "policy_weight": -1, "base_loss_weight": 1.1,
    "embedding_scale": 0.0, "teacher_decay": 1.1, "entropy_weight": -1, "kl_weight": -1, "gain_weight": -1,
}  # fmt: skip
OPTIONAL = {"talk_loss_weight": -0.1, "clip_ratio": 0, "anchors_per_text": 0}


@pytest.mark.parametrize("name", [*INTEGERS, *OUTSIDE])
@pytest.mark.parametrize("value", ["1", None, True, [1], 1j], ids=str)
def test_other_types_are_refused(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be .*got {value!r}".replace("[", r"\[").replace("]", r"\]")):
        QuietStarConfig(**{name: value})


@pytest.mark.parametrize("name", [*INTEGERS, *OUTSIDE])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be .*got {value}"):
        QuietStarConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [*((name, least - 1) for name, least in INTEGERS.items()), *OUTSIDE.items()]
)
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*got {value}"):
        QuietStarConfig(**{name: value})


def test_every_field_with_a_range_is_tested_and_may_have_its_least_value():
    assert INTERVALS.keys() == INTEGERS.keys() | OUTSIDE.keys()
    for name, least in INTEGERS.items():
        assert getattr(QuietStarConfig(**{name: least}), name) == least
    assert QuietStarConfig(thought_temperature=0, policy_weight=0, base_loss_weight=1).base_loss_weight == 1


@pytest.mark.parametrize(("name", "value"), OPTIONAL.items())
def test_numbers_that_may_be_none(name, value):
    assert OPTIONAL.keys() == OPTIONAL_INTERVALS.keys()
    assert getattr(QuietStarConfig(**{name: None}), name) is None
    with pytest.raises(ValueError, match=f"^{name} must be .*got {value}"):
        QuietStarConfig(**{name: value})
    with pytest.raises(TypeError, match=f"^{name} must be .*got '1'"):
        QuietStarConfig(**{name: "1"})


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    with pytest.raises(ValueError, match=f"^{name} must be '.*' or '.*', got 'other'"):
        QuietStarConfig(**{name: "other"})


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(name):
    with pytest.raises(TypeError, match=f"^{name} must be True or False, got 1"):
        QuietStarConfig(**{name: 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"advantage": "leave_one_out", "num_thoughts": 1}, "num_thoughts .* advantage 'leave_one_out', got 1"),
        ({"reward": "log_mean", "num_thoughts": 1, "advantage": "none"}, "num_thoughts .* reward 'log_mean', got 1"),
        ({"reward": "log_mean"}, "advantage .* with reward 'log_mean', got 'mean'"),
        ({"policy_updates": 2}, "clip_ratio must be a number with policy_updates 2, got None"),
        ({"learned_thought_end": True, "thought_length": 0}, "thought_length .* with learned_thought_end True, got 0"),
        ({"anchor_choice": "entropy"}, "anchors_per_text must be a number with anchor_choice 'entropy', got None"),
    ],
)
def test_contradictions_are_refused_with_both_names(fields, message):
    with pytest.raises(ValueError, match=message):
        QuietStarConfig(**fields)


@pytest.mark.parametrize("name", ["start_thought_token_id", "end_thought_token_id"])
@pytest.mark.parametrize("value", ["1", 1.0, True])
def test_thought_tokens_are_integers(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a token id or None, got {value!r}"):
        QuietStarConfig(**{name: value})


def test_fields_set_later_are_checked_by_the_model():
    config = QuietStarConfig()
    config.lookahead = 0
    with pytest.raises(ValueError, match="lookahead must be an integer >= 1, got 0"):
        QuietStarForCausalLM(config)


def test_rotary_embeddings_of_several_kinds_are_left_to_the_decoder():
    text = Olmo3Config(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    config = QuietStarConfig(text_config=text.to_dict())
    assert config.text_config.rope_parameters == text.rope_parameters
