"""generate() of transformers with thoughts inside."""

import pytest
import torch
from greedy_text import SOME_ACCEPTED, greedy, left_padded, recompute
from transformers import CompileConfig, DynamicCache, TextStreamer

from quietstar.models.layouts import ThoughtCache, ThoughtStates, as_text, thoughts
from quietstar.models.outputs import ThoughtStreamer
from quietstar.models.transformers_names import CACHE


@pytest.fixture(params=[False, True], ids=["", "op"])
def op_attends(request, monkeypatch):
    """Also attend by the op where a CPU would take thoughts for text, as every other device does."""
    if request.param:
        monkeypatch.setattr(ThoughtCache, "is_text", lambda *_: False)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("window", [None, 6, 14])
def test_greedy_equals_recomputing_everything(make_model, text, op_attends, window, options):
    model = make_model(thought_temperature=0.0, sliding_window=window)
    with torch.no_grad():
        wanted = recompute(model, text, 10)
    assert torch.equal(greedy(model, text, **options), wanted)


WAYS = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt in pieces": {"prefill_chunk_size": 5},
    "prompt in pieces, static cache": {"prefill_chunk_size": 5, "cache_implementation": "static"},
    "drafts": {"draft_length": 3},
    "drafts of any length": {"draft_length": "auto"},
    "drafts, static cache": {"draft_length": 3, "cache_implementation": "static"},
    "thoughts in view": {"return_thoughts": True},
    "wherever unsure": {"think": 0.0},
}


@pytest.mark.parametrize("window", [None, 6, 14])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_every_way_to_the_text_gives_the_same(make_model, text, padded, window):
    """Half a rename in transformers would leave a cache unheard, which no error tells."""
    model = make_model(thought_temperature=0.0, sliding_window=window)
    model.mixing_head[-1].weight.data *= SOME_ACCEPTED
    inputs, mask = left_padded(text) if padded else (text, torch.ones_like(text))
    with torch.no_grad():
        wanted = recompute(model, inputs, 10, mask if padded else None)
    for name, options in WAYS.items():
        output = greedy(model, inputs, attention_mask=mask, return_dict_in_generate=True, **options)
        assert torch.equal(output.sequences, wanted), name


@pytest.mark.parametrize("window", [None, 6, 14])
def test_few_thoughts_are_text_on_a_cpu(make_model, text, monkeypatch, window):
    """Attention to thoughts as if they were text gives what the op gives, also with padding."""
    mask = torch.ones_like(text)
    mask[1, :5] = 0
    model = make_model(thought_temperature=0.0, sliding_window=window)
    kept = torch.tensor([6, 11])

    def outputs():
        with torch.no_grad():
            predicted = model(text, attention_mask=mask, logits_to_keep=kept, thought_states=ThoughtStates())
            return predicted.logits, predicted.thought_tokens

    ours = outputs()
    monkeypatch.setattr(ThoughtCache, "is_text", lambda *_: False)
    for output, wanted in zip(ours, outputs(), strict=True):
        torch.testing.assert_close(output, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 6])
def test_a_cache_may_hold_more_than_the_window(make_model, text, op_attends, window):
    model = make_model(thought_temperature=0.0, sliding_window=window)
    with torch.no_grad():
        wanted = recompute(model, text, 4)
    assert torch.equal(greedy(model, text, 4, **{CACHE: DynamicCache()}), wanted)


@pytest.mark.parametrize("window", [None, 6])
def test_masks_made_once_are_made_anew_for_longer_texts(make_model, text, monkeypatch, window):
    monkeypatch.setattr(as_text, "_MASKED_AHEAD", 2)
    model = make_model(thought_temperature=0.0, sliding_window=window)
    with torch.no_grad():
        wanted = recompute(model, text, 10)
    assert torch.equal(greedy(model, text), wanted)


@pytest.mark.parametrize("thought_length", [0, 1, 3])
def test_a_token_takes_one_pass_more_than_its_thought_has_tokens(make_model, text, thought_length):
    model = make_model(thought_length=thought_length)
    passes = []
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    for options in ({}, {"return_thoughts": True}):
        passes.clear()
        model.generate(text, max_new_tokens=8, **options)
        assert len(passes) == 8 * (max(thought_length, 1) + 1)


def test_what_generate_leaves_is_not_bound_to_inference_mode(make_model, text):
    """The text, a returned cache, and a static cache, which transformers keeps for the next call."""
    model = make_model(thought_temperature=0.0)
    wanted = greedy(model, text, 3)
    assert not wanted.is_inference()
    assert not greedy(model, text, 3, return_dict_in_generate=True)[CACHE].layers[0].keys.is_inference()
    model.generation_config.cache_implementation = "static"
    for options in ({}, {"return_dict_in_generate": True}):
        output = greedy(model, text, 3, **options)
    assert torch.equal(output.sequences, wanted)
    assert not output[CACHE].layers[0].keys.is_inference()


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"draft_length": 3}], ids=str)
@pytest.mark.parametrize("window", [None, 6, 14])
def test_left_padded_rows_equal_the_prompt_alone(make_model, text, op_attends, window, options):
    model = make_model(thought_temperature=0.0, sliding_window=window)
    alone = greedy(model, text[1:, 5:])[:, 7:]
    batch = text.clone()
    batch[1, :5] = 0
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    together = greedy(model, batch, attention_mask=mask, **options)[:, 12:]
    assert torch.equal(together[1:], alone)
    assert torch.equal(together[:1], greedy(model, text[:1])[:, 12:])


def test_thought_tokens_are_never_generated(make_model, text):
    model = make_model()
    model.lm_head.weight.data[-2:] = 100 * model.model.norm.weight  # the model would like nothing better
    assert int(model.generate(text, max_new_tokens=20, do_sample=True, temperature=2.0).max()) < 38
    for options in ({}, {"draft_length": 3, "do_sample": True, "temperature": 2.0}, {"do_sample": True, "top_k": 1}):
        output = model.generate(text, max_new_tokens=20, return_thoughts=True, **options)
        assert int(output.sequences.max()) < 38
        assert int(output.thought_tokens.max()) < 38


@pytest.mark.parametrize("options", [{}, {"draft_length": "auto"}], ids=str)
def test_the_same_seed_gives_the_same_text(make_model, text, options):
    model = make_model()
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(model.generate(text, max_new_tokens=12, do_sample=True, **options))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("options", [{}, {"draft_length": 3}, {"draft_length": "auto", "think": 2.5}], ids=str)
@pytest.mark.parametrize("thought_length", [0, 3])
def test_thoughts_in_view(make_model, text, thought_length, options):
    """Every step is what the model says about the finished text; eos stops the second row early."""
    model = make_model(thought_temperature=0.0, thought_length=thought_length)
    plain = model.generate(text, max_new_tokens=9, do_sample=False, **options)
    eos = int(plain[1, 15])
    output = model.generate(text, max_new_tokens=9, do_sample=False, return_thoughts=True, eos_token_id=eos, **options)
    with torch.no_grad():
        whole = model(plain, suppress_thought_tokens=True)
        base = base_logits(model, plain)
    for row in range(2):
        steps = output.steps(row)
        assert [step.token for step in steps] == [*cut(plain[row, 12:].tolist(), eos)]
        for position, step in enumerate(steps, start=11):
            before = base[row, position].log_softmax(-1)
            thinks = float(torch.special.entr(before.exp()).sum()) > options.get("think", -1)
            assert step.thought == (whole.thought_tokens[row, 0, position].tolist() if thinks else None)
            after = whole.logits[row, position].log_softmax(-1) if thinks else before
            weight = whole.mixing_weight[row, 0, position, 0] if thinks else torch.tensor(0.0)
            expected = torch.stack([weight, before[step.token], after[step.token]])
            torch.testing.assert_close(torch.tensor(step[2:]), expected, atol=1e-3, rtol=1e-3)
            assert step.gain == step.logprob - step.base_logprob
    assert output.thought_share == output.thinks.sum() / output.new_tokens.sum()
    assert 0 < output.thought_share <= 1
    assert (output.thought_share < 1) == ("think" in options)


def base_logits(model, text):
    """Logits [B, L, V] of the Mistral inside, which does not think and may not say the thought tokens."""
    logits = model.lm_head(model.model(text).last_hidden_state)
    logits[..., -2:] = -torch.inf
    return logits


def cut(tokens, eos):
    """Up to the first ``eos``, which is kept."""
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


@pytest.mark.parametrize("draft_length", [None, 2])
def test_thinking_only_where_the_base_model_is_unsure(make_model, text, draft_length):
    model = make_model(thought_temperature=0.0)
    for think, limit in (("never", torch.inf), (2.5, 2.5), (0.0, 0.0)):
        wanted, thoughts = text, 0
        for _ in range(8):
            with torch.no_grad():
                base, mixed = (
                    base_logits(model, wanted)[:, -1],
                    model(wanted, suppress_thought_tokens=True).logits[:, -1],
                )
            unsure = torch.special.entr(base.softmax(-1)).sum(-1) > limit
            thoughts += int(unsure.sum())
            chosen = torch.where(unsure[:, None], mixed, base).argmax(-1, keepdim=True)
            wanted = torch.cat([wanted, chosen], dim=1)
        output = model.generate(
            text,
            max_new_tokens=8,
            do_sample=False,
            think=think,
            draft_length=draft_length,
            return_dict_in_generate=True,
        )
        assert torch.equal(output.sequences, wanted)
        assert output.thought_share == thoughts / 16
        assert 0 < thoughts < 16 or think != 2.5


def test_skipped_positions_cost_one_base_pass(make_model, text, monkeypatch):
    model = make_model()
    passes = []
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    model.generate(text, max_new_tokens=8, think="never")
    assert len(passes) == 8


@pytest.mark.parametrize("options", [{}, {"draft_length": 3}, {"draft_length": 3, "think": 2.5}], ids=str)
def test_room_for_thoughts_is_made_once(make_model, text, monkeypatch, options):
    made = []
    monkeypatch.setattr(ThoughtCache, "is_text", lambda *_: False)
    monkeypatch.setattr(thoughts, "_new_room", lambda *a, make=thoughts._new_room: made.append(1) or make(*a))
    make_model().generate(text, max_new_tokens=12, **options)
    assert len(made) == 2  # one per layer


class Tokens(TextStreamer):
    """Notes what it is given."""

    def __init__(self):
        self.received = []

    def put(self, value):
        self.received.append(value.tolist())

    def end(self):
        self.received.append("end")


@pytest.mark.parametrize("options", [{}, {"draft_length": 3}], ids=str)
def test_streamer(make_model, options):
    """Columns come in order, each when it is certain in every row; rows go at their own pace at this weight."""
    model = make_model(thought_temperature=0.0)
    model.mixing_head[-1].weight.data *= 0.02
    text, streamer = torch.randint(1, 38, (5, 12)), Tokens()
    output = greedy(model, text, 12, streamer=streamer, eos_token_id=[3, 4], **options)
    assert streamer.received == [text.tolist(), *output[:, 12:].T.tolist(), "end"]


def test_streamed_thoughts_are_those_returned(make_model, text):
    class Steps(ThoughtStreamer):
        def __init__(self):
            self.received = []

        def put_step(self, step):
            self.received.append(step)

    model = make_model()
    streamer = Steps()
    output = model.generate(text[:1], max_new_tokens=7, draft_length=2, return_thoughts=True, streamer=streamer)
    assert streamer.received == output.steps()
    assert len(streamer.received) == 7


@pytest.mark.slow
def test_decode_step_compiles_to_one_graph(make_model, text, monkeypatch):
    """What transformers compiles for a static cache on a GPU: no break, and no graph anew for every length."""
    monkeypatch.setattr(ThoughtCache, "is_text", lambda *_: False)  # as on a GPU
    model = make_model(thought_temperature=0.0)
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = greedy(model, text, 6, cache_implementation="static", compile_config=config)
    assert graphs["unique_graphs"] == 1
    assert torch.equal(compiled, greedy(model, text, 6))


@pytest.mark.parametrize("options", [{}, {"draft_length": 4}], ids=str)
def test_own_stopping_criterion(make_model, text, options):
    """A criterion that looks at the text, and must be asked about every token of a round."""
    model = make_model(thought_temperature=0.0)
    whole = greedy(model, text[:1], 12)
    stop = whole[0, 16]
    criteria = [lambda ids, _scores: (ids[:, -1] == stop) & (ids.shape[1] > 13)]
    wanted = 14 + whole[0, 13:].tolist().index(stop)
    assert torch.equal(greedy(model, text[:1], 12, stopping_criteria=criteria, **options), whole[:, :wanted])
