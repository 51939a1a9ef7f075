"""Arguments of transformers' generate(): they do what they do for a Mistral, or are refused by name."""

import re

import character_model
import pytest
import torch
from greedy_text import SOME_ACCEPTED, greedy
from transformers import DynamicCache, GenerationConfig, MistralConfig, MistralForCausalLM

from quietstar.models.outputs import ThoughtStreamer
from quietstar.models.transformers_names import ASSISTANTS_WORK, CACHE


def base_model(model):
    """The Mistral inside, by itself."""
    mistral = MistralForCausalLM(MistralConfig(**model.config.text_config.to_dict())).eval()
    mistral.load_state_dict(model.state_dict(), strict=False)
    return mistral


@pytest.mark.parametrize("window", [None, 6, 14])
@pytest.mark.parametrize("padding", [0, 5])
def test_assisted_text_is_the_same(make_model, text, padding, window):
    """Whoever drafts; the model is as before afterwards."""
    model = make_model(thought_temperature=0.0, sliding_window=window)
    model.mixing_head[-1].weight.data *= SOME_ACCEPTED
    text, mask = text[:1], torch.ones_like(text[:1])
    mask[:, :padding] = 0
    wanted = greedy(model, text, 20, attention_mask=mask)
    ways = [{"prompt_lookup_num_tokens": 3}]
    if ASSISTANTS_WORK:
        ways += [{"assistant_model": assistant} for assistant in (base_model(model), make_model(), model)]
    for options in (*ways, {}):
        assert torch.equal(greedy(model, text, 20, attention_mask=mask, **options), wanted), [*options]


@pytest.mark.parametrize("options", [{"assistant_early_exit": 1}, {"draft_length": 2, "num_beams": 2}], ids=str)
def test_what_is_refused_leaves_the_model_as_it_was(make_model, text, options):
    model = make_model(thought_temperature=0.0)
    wanted, settings = greedy(model, text), model.config.to_dict()
    with pytest.raises(ValueError, match=next(reversed(options))):
        greedy(model, text, **options)
    assert model.config.to_dict() == settings
    assert torch.equal(greedy(model, text), wanted)


@pytest.mark.parametrize("options", [{}, {"draft_length": 2}], ids=str)
def test_text_ends_with_a_stop_string(options):
    tokenizer, model = character_model.make_tokenizer(), character_model.make_model(thought_temperature=0.0)
    inputs = tokenizer("Q: How many?", return_tensors="pt")["input_ids"]
    text = tokenizer.decode(greedy(model, inputs, 12, **options)[0])
    stop = text[16:18]
    stopped = greedy(model, inputs, 12, stop_strings=[stop], tokenizer=tokenizer, **options)[0]
    said = tokenizer.decode(stopped)
    assert said == text[: len(said)]
    assert said.index(stop, 12) == len(said) - 2


def test_hidden_states_are_those_of_the_base_model(make_model, text):
    """Of the prompt, and then of every token."""
    model = make_model(thought_temperature=0.0)
    output = greedy(model, text, 5, return_dict_in_generate=True, output_hidden_states=True)
    with torch.no_grad():
        wanted = base_model(model)(output.sequences[:, :-1], output_hidden_states=True).hidden_states
    assert [states[0].shape[1] for states in output.hidden_states] == [12, 1, 1, 1, 1]
    for layer, states in enumerate(wanted):
        actual = torch.cat([step[layer] for step in output.hidden_states], dim=1)
        torch.testing.assert_close(actual, states, atol=1e-4, rtol=1e-4)


def test_scores_and_logits_are_those_of_the_model(make_model, text):
    model = make_model(thought_temperature=0.0)
    output = greedy(
        model, text, 5, repetition_penalty=1.5, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    with torch.no_grad():
        whole = model(output.sequences, suppress_thought_tokens=True).logits[:, 11:-1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), whole, atol=1e-4, rtol=1e-4)
    for step, scores in enumerate(output.scores):
        seen = output.sequences[:, : 12 + step]
        before = whole[:, step].gather(1, seen)
        penalised = whole[:, step].scatter(1, seen, torch.where(before < 0, before * 1.5, before / 1.5))
        torch.testing.assert_close(scores, penalised, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"draft_length": 2}], ids=str)
def test_several_continuations(make_model, text, options):
    several = make_model().generate(text, max_new_tokens=4, do_sample=True, num_return_sequences=3, **options)
    assert several.shape == (6, 16)
    assert torch.equal(several[:, :12], text.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in several.tolist()}) == 6


def test_beams(make_model, text):
    """The score of a beam is the log-probability of its text, which a wrong cache would not give."""
    model = make_model(thought_temperature=0.0)
    options = {"length_penalty": 0.0, "return_dict_in_generate": True, "output_scores": True}
    output = greedy(model, text, 5, num_beams=3, **options)
    with torch.no_grad():
        logprobs = model(output.sequences, suppress_thought_tokens=True).logits[:, 11:-1].log_softmax(-1)
    wanted = logprobs.gather(-1, output.sequences[:, 12:, None]).sum(dim=(1, 2))
    torch.testing.assert_close(output.sequences_scores, wanted, atol=1e-4, rtol=1e-4)


def test_guidance(make_model, text):
    """Away from what the model says behind the last token of the prompt alone (the default of transformers)."""
    model = make_model(thought_temperature=0.0)
    wanted = text
    with torch.no_grad():
        for _ in range(6):
            with_prompt, without = (
                model(x, suppress_thought_tokens=True).logits[:, -1].log_softmax(-1) for x in (wanted, wanted[:, 11:])
            )
            scores = torch.where(with_prompt.isinf(), with_prompt, without + 1.5 * (with_prompt - without))
            wanted = torch.cat([wanted, scores.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(greedy(model, text, 6, guidance_scale=1.5), wanted)


def test_arguments_by_position(make_model, text):
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    model = make_model(thought_temperature=0.0)
    assert torch.equal(model.generate(text, config), greedy(model, text, 4))
    assert torch.equal(model.generate(text, config, draft_length=2), greedy(model, text, 4))


@pytest.mark.parametrize("asks", ["argument", "generation_config", "model.generation_config", "model.config"])
@pytest.mark.parametrize("options", [{}, {"draft_length": 2}, {"num_beams": 2}], ids=str)
def test_attention_weights_are_refused(make_model, text, options, asks):
    model, options = make_model(), dict(options)
    if asks == "argument":
        options["output_attentions"] = True
    elif asks == "generation_config":
        options["generation_config"] = GenerationConfig(output_attentions=True)
    elif asks == "model.generation_config":
        model.generation_config.output_attentions = True
    else:
        model.config._output_attentions = True  # as loaded; setting it is refused by transformers
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model.generate(text, max_new_tokens=2, **options)


@pytest.mark.parametrize(
    "options", [{}, {"draft_length": 2}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str
)
@pytest.mark.parametrize("given", [True, False], ids=["mask", "padding tokens"])
def test_right_padding_is_refused(make_model, text, options, given):
    """Where Mistral warns: what is generated would stand behind the padding."""
    text = text[:1] if "prompt_lookup_num_tokens" in options else text
    text[-1, 9:] = 0
    mask = {"attention_mask": (text != 0).long()} if given else {}
    with pytest.raises(ValueError, match=r"attention_mask must pad prompts on the left in generate\(\)"):
        make_model().generate(text, max_new_tokens=2, **mask, **options)


EMPTY = torch.zeros(1, 0, dtype=torch.int64)

LONG = torch.ones(1, 257, dtype=torch.int64)

BAD_INPUT = {
    "draft_length 0": ({"draft_length": 0}, ValueError, "draft_length must be None, 'auto' or an integer >= 1, got 0"),
    "draft_length -1": (
        {"draft_length": -1},
        ValueError,
        "draft_length must be None, 'auto' or an integer >= 1, got -1",
    ),
    "draft_length text": ({"draft_length": "four"}, TypeError, "draft_length must be None, 'auto' or an integer"),
    "draft_length 1.5": ({"draft_length": 1.5}, TypeError, "draft_length must be None, 'auto' or an integer"),
    "draft_length True": ({"draft_length": True}, TypeError, "draft_length must be None, 'auto' or an integer"),
    "think text": ({"think": "often"}, TypeError, "think must be 'always', 'never' or a threshold in nats >= 0, got"),
    "think -1": ({"think": -1.0}, ValueError, "think must be 'always', 'never' or a threshold in nats >= 0, got -1.0"),
    "think nan": ({"think": float("nan")}, ValueError, "think must be 'always', 'never' or a threshold"),
    "return_thoughts": ({"return_thoughts": "yes"}, TypeError, "return_thoughts must be True or False, got 'yes'"),
    "beams": ({"draft_length": 2, "num_beams": 2}, ValueError, "num_beams must be 1 with draft_length, think or"),
    "lookup": ({"think": "never", "prompt_lookup_num_tokens": 2}, ValueError, "prompt lookup must be left out with"),
    "cache": ({"draft_length": 2, CACHE: DynamicCache()}, ValueError, f"{CACHE} must be None with"),
    "scores": (
        {"draft_length": 2, "output_scores": True, "return_dict_in_generate": True},
        ValueError,
        "output_scores must be left out with",
    ),
    "guidance": ({"draft_length": 2, "guidance_scale": 1.5}, ValueError, "guidance_scale must be left out with"),
    "custom_generate": (
        {"think": "never", "custom_generate": lambda model, input_ids, **_: input_ids},
        ValueError,
        "custom_generate must be None with draft_length, think or return_thoughts, got function",
    ),
    "typo": ({"max_new_token": 3}, ValueError, "max_new_token"),
    "typo in an option": ({"draft_lenght": 2}, ValueError, "draft_lenght"),
    "typo beside an option": ({"draft_length": 2, "max_new_token": 3}, ValueError, "max_new_token"),
    "of forward": ({"labels": EMPTY}, ValueError, "labels must be left out of generate()"),
    "of forward beside an option": (
        {"think": "never", "thought_tokens": EMPTY},
        ValueError,
        "thought_tokens must be left",
    ),
    "of the model alone": (
        {"think": "never", "num_items_in_batch": 2},
        ValueError,
        "num_items_in_batch must be left out",
    ),
    "hidden states": (
        {"think": "never", "output_hidden_states": True},
        ValueError,
        "output_hidden_states must be left out",
    ),
    "logits": ({"return_thoughts": True, "output_logits": True}, ValueError, "output_logits must be left out with"),
    "embeddings": (
        {"think": "never", "inputs_embeds": torch.zeros(2, 12, 32)},
        ValueError,
        "inputs_embeds must be left",
    ),
    "packed": (
        {"think": "never", "position_ids": torch.arange(6).repeat(2, 2)},
        ValueError,
        "position_ids must go up by one in generate(), got packed documents",
    ),
    "packed, plain": ({"position_ids": torch.arange(6).repeat(2, 2)}, ValueError, "position_ids must go up by one"),
    "of no one": ({"thinking": "never"}, ValueError, "thinking must be left out of generate()"),
    "streamer": (
        {"return_thoughts": True, "streamer": ThoughtStreamer()},
        ValueError,
        "streamer must be given one sequence, got 2",
    ),
    "streamer alone": (
        {"streamer": ThoughtStreamer()},
        ValueError,
        "return_thoughts must be True with a ThoughtStreamer",
    ),
    "empty prompt": (
        {"inputs": EMPTY},
        ValueError,
        "input_ids must hold at least one token per prompt, got shape [1, 0]",
    ),
    "empty input_ids": ({"input_ids": EMPTY, "inputs": None}, ValueError, "input_ids must hold at least one token"),
    "long prompt": (
        {"inputs": LONG},
        ValueError,
        "input_ids must have at most max_position_embeddings = 256 tokens, got",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named(make_model, text, name):
    arguments, error, message = BAD_INPUT[name]
    with pytest.raises(error, match=re.escape(message)):
        make_model().generate(**{"inputs": text, "max_new_tokens": 3} | arguments)


def test_padding_does_not_count_as_prompt(make_model):
    mask = torch.ones_like(LONG)
    mask[0, :100] = 0
    assert make_model().generate(LONG, attention_mask=mask, max_new_tokens=1).shape == (1, 258)


def test_steps_need_thoughts(make_model, text):
    output = make_model().generate(text, max_new_tokens=2, draft_length=1, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="return_thoughts must be True in generate"):
        output.steps()
