"""``think`` and ``draft_length`` where the call does not say: the generation config, then the configuration."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from quietstar import QuietStarConfig, QuietStarForCausalLM

BAD = {
    "think": ["sometimes", -1.0, True, None, float("nan")],
    "gain_threshold": ["much", True, None, float("nan"), float("inf")],
    "draft_length": ["none", 0, -2, True, 1.5],
}
CASES = [(name, value) for name, values in BAD.items() for value in values]


def drawn(model, **options):
    """How often the model thought and drafted in a call that is asked for nothing else."""
    torch.manual_seed(0)
    prompt = torch.tensor([[3, 4, 5]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "return_thoughts": True} | options
    output = model.generate(prompt, **options)
    return output.thought_share, output.drafted


def test_the_defaults_are_those_of_before(make_model):
    assert drawn(make_model()) == (1, 0)
    assert (QuietStarConfig().think, QuietStarConfig().draft_length) == ("always", None)


@pytest.mark.parametrize("place", ["config", "generation_config"])
def test_a_model_may_say_it_and_a_call_overrides_it(make_model, tmp_path, place):
    model = make_model()
    getattr(model, place).think = "never"
    getattr(model, place).draft_length = 2
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    share, drafts = drawn(loaded)
    assert share == 0
    assert drafts > 0
    assert drawn(loaded, draft_length=None) == (0, 0)
    assert drawn(loaded, think="always", draft_length=None) == (1, 0)
    assert drawn(loaded, think="always")[0] == 1


def test_the_generation_config_of_a_call_counts_before_the_models_and_that_before_the_configuration(make_model):
    model = make_model(think="never")
    assert drawn(model)[0] == 0
    model.generation_config.think = "always"
    assert drawn(model)[0] == 1
    given = GenerationConfig(think="never", max_new_tokens=4, pad_token_id=0)
    assert drawn(model, generation_config=given)[0] == 0
    assert drawn(model, generation_config=given, think="always")[0] == 1
    output = model.generate(torch.tensor([[3, 4, 5]]), given, return_thoughts=True)  # the second argument there
    assert output.thought_share == 0


def test_an_override_when_loading(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path, think=1e9, draft_length="auto")
    assert (loaded.config.think, loaded.config.draft_length) == (1e9, "auto")
    assert drawn(loaded)[0] == 0


@pytest.mark.parametrize(("name", "value"), CASES)
def test_what_makes_no_sense_is_refused_when_it_is_set(make_model, name, value):
    wanted = rf"^{name} must be .*got {value!r}"
    with pytest.raises((TypeError, ValueError), match=wanted):
        QuietStarConfig(**{name: value})
    config = QuietStarConfig()
    with pytest.raises((TypeError, ValueError), match=wanted):
        setattr(config, name, value)
    model = make_model()
    setattr(model.generation_config, name, value)
    with pytest.raises((TypeError, ValueError), match=wanted):
        drawn(model)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("load", [QuietStarForCausalLM, AutoModelForCausalLM])
def test_what_makes_no_sense_is_refused_when_it_is_loaded(make_model, tmp_path, load, file):
    make_model().save_pretrained(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"think": "sometimes"}))
    with pytest.raises(TypeError, match=r"^think must be 'always', 'never' or a threshold in nats >= 0, got 'some"):
        load.from_pretrained(tmp_path)
