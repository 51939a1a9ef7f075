"""Logits processors and stopping criteria with a state: called once per token, in order, as by transformers."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from quietstar.models.text_rules import TextRules

OPTIONS = [
    {},
    {"return_thoughts": True},
    {"think": "never"},
    {"think": 2.5},
    {"draft_length": 1},
    {"draft_length": 4},
    {"draft_length": "auto", "think": 2.5, "return_thoughts": True},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=str)


class Notes(LogitsProcessor):
    """Notes the texts it is asked about."""

    def __init__(self):
        self.texts = []

    def __call__(self, input_ids, scores):
        self.texts.append(input_ids.clone())
        return scores


class Cycle(Notes):
    """A grammar whose state goes forward by one token per call: 10, 11, 12 and again."""

    def __call__(self, input_ids, scores):
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, 10 + len(self.texts) % 3] = 0
        return super().__call__(input_ids, scores + allowed)


class StopsAt(StoppingCriteria):
    """Stops row b at its call number ``calls[b]``."""

    def __init__(self, *calls):
        self.calls, self.texts = torch.tensor(calls), []

    def __call__(self, input_ids, scores, **kwargs):
        self.texts.append(input_ids.clone())
        return self.calls <= len(self.texts)


def generate(model, text, rules, **arguments):
    return model.generate(
        text,
        **{"max_new_tokens": 12, "return_dict_in_generate": True} | arguments,
        logits_processor=LogitsProcessorList([x for x in rules if isinstance(x, LogitsProcessor)]),
        stopping_criteria=StoppingCriteriaList([x for x in rules if isinstance(x, StoppingCriteria)]),
    ).sequences


@pytest.fixture
def model(make_model):
    """One that accepts about half of its drafts."""
    model = make_model(thought_temperature=0.0)
    model.mixing_head[-1].weight.data *= 0.02
    return model


@options
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("eos", [None, [*range(1, 8)]], ids=["", "eos"])
def test_each_is_asked_once_per_token(model, text, options, do_sample, eos):
    """About all rows, those that have stopped included, until the last has."""
    notes, stops = Notes(), StopsAt(11, 7)
    sequences = generate(model, text, [notes, stops], do_sample=do_sample, eos_token_id=eos, **options)
    new = sequences.shape[1] - 12
    assert len(notes.texts) == len(stops.texts) == new <= 11
    for i in range(new):
        assert torch.equal(notes.texts[i], sequences[:, : 12 + i])
        assert torch.equal(stops.texts[i], sequences[:, : 13 + i])


@options
@pytest.mark.parametrize("eos", [None, [12]], ids=["", "eos"])
def test_a_grammar_is_followed(model, text, options, eos):
    wanted = [10, 11, 12] * 4 if eos is None else [10, 11, 12]
    sequences = generate(model, text, [Cycle()], do_sample=False, eos_token_id=eos, **options)
    assert sequences[:, 12:].tolist() == [wanted] * 2


@pytest.mark.parametrize("options", [x for x in OPTIONS if "think" not in x], ids=str)
@pytest.mark.parametrize("eos", [None, [*range(1, 8)]], ids=["", "eos"])
def test_text_is_the_same_as_in_the_loop_of_transformers(model, text, options, eos):
    """Also where one row stops before the other, and where drafts know nothing of a processor."""

    class Odd(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.masked_fill((torch.arange(scores.shape[1]) + input_ids.shape[1]) % 2 == 0, -torch.inf)

    arguments = {"do_sample": False, "eos_token_id": eos, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    wanted = generate(model, text, [Odd(), StopsAt(11, 5)], **arguments)
    assert torch.equal(generate(model, text, [Odd(), StopsAt(11, 5)], **arguments, **options), wanted)


@options
def test_a_function_of_the_prefix_is_asked_once_per_token(model, text, options):
    asked = []

    def allowed(row, prefix):
        asked.append((row, len(prefix)))
        return [10 + len(prefix) % 3]

    sequences = model.generate(text, max_new_tokens=6, do_sample=False, prefix_allowed_tokens_fn=allowed,
                               return_dict_in_generate=True, **options).sequences  # fmt: skip
    assert sequences[:, 12:].tolist() == [[10, 11, 12] * 2] * 2
    assert asked == [(row, length) for length in range(12, 18) for row in range(2)]


def test_drafts_go_through_what_keeps_no_state(model, text):
    """What is left of the vocabulary is no secret to them; what a grammar of one's own allows is."""
    rates = []
    for processors, suppressed in (([], [*range(10), *range(13, 38)]), ([Cycle()], None)):
        output = model.generate(
            text, max_new_tokens=16, do_sample=False, draft_length=3, return_dict_in_generate=True,
            suppress_tokens=suppressed, logits_processor=LogitsProcessorList(processors),
        )  # fmt: skip
        rates.append(output.acceptance_rate)
    assert rates[0] > 0.3
    assert rates[1] < 0.15


@options
def test_predictions_are_kept_from_processors_that_write(model, text, options):
    """Log-probabilities are those before processors."""

    def forbids_in_place(_, scores):
        scores[:, ::2] = -torch.inf
        return scores

    def forbids(input_ids, scores):
        return forbids_in_place(input_ids, scores.clone())

    outputs = [
        model.generate(text, max_new_tokens=8, do_sample=False, logits_processor=LogitsProcessorList([process]),
                       **options | {"return_thoughts": True})
        for process in (forbids_in_place, forbids)
    ]  # fmt: skip
    for name in ("sequences", "base_logprobs", "logprobs"):
        assert torch.equal(*(output[name] for output in outputs)), name


@pytest.mark.parametrize(
    ("processors", "criteria", "stateless"),
    [
        ([], [MaxLengthCriteria(9)], True),
        ([TemperatureLogitsWarper(0.5), RepetitionPenaltyLogitsProcessor(1.2)], [EosTokenCriteria(1)], True),
        ([TemperatureLogitsWarper(0.5), Notes()], [MaxLengthCriteria(9)], False),
        ([type("Own", (TemperatureLogitsWarper,), {})(0.5)], [], False),
        ([], [StopsAt(3)], False),
        ([], [StopStringCriteria.__new__(StopStringCriteria)], False),
        ([], [StopStringCriteria.__new__(StopStringCriteria), EosTokenCriteria(1)], True),
    ],
)
def test_what_may_be_asked_twice(processors, criteria, stateless):
    rules = TextRules(LogitsProcessorList(processors), StoppingCriteriaList(criteria))
    assert rules.stateless == stateless
    assert [type(x) for x in rules.for_drafts] == [type(x) for x in processors if type(x).__module__ != __name__]
