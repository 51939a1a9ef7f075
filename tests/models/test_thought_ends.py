"""Thoughts that end themselves, against each thought alone, step by step, through the family's own model."""

import pytest
import torch
from greedy_text import greedy, left_padded
from thoughts_alone import Alone

from quietstar.models import entropy
from quietstar.models.ending import EndingThinker
from quietstar.models.head import Head
from quietstar.models.lengths import drawn_tokens

START, END, K = 38, 39, 4


@pytest.fixture
def make(make_model):
    """Models whose greedy thoughts have all lengths: the end is likely."""

    def make(**fields):
        torch.manual_seed(3)
        model = make_model(
            **{"thought_length": K, "learned_thought_end": True, "thought_temperature": 0.0, "num_thoughts": 1} | fields
        )
        model.lm_head.weight.data[END] *= 2.5
        return model

    return make


@torch.no_grad()
def thinks_alone(model, row, i):
    """The greedy thought behind position i of text [L], one token after the other, as [k]."""
    alone, thought = Alone(model), []
    while len(thought) < model.config.thought_length:
        slots = alone.thought(row[None], i, torch.tensor([thought], dtype=torch.int64))
        logits = alone.logits(slots)[0, len(thought)]
        logits[[START, END] if not thought else [START]] = -torch.inf
        token = int(logits.argmax())
        if token == END:
            break
        thought.append(token)
    return torch.tensor(thought + [-1] * (model.config.thought_length - len(thought)))


def all_alone(model, text):
    return torch.stack([torch.stack([thinks_alone(model, row, i) for i in range(len(row))]) for row in text])


def lengths(thoughts):
    return set((thoughts >= 0).sum(-1).flatten().tolist())


def test_sampled_thoughts_are_those_of_each_position_alone(make, text):
    """Whoever else has ended by then; behind all positions, behind some, with windows and without."""
    for window in (None, 5):
        model = make(sliding_window=window)
        wanted = all_alone(model, text)
        assert lengths(wanted) == {1, 2, 3, 4}
        assert torch.equal(model.sample_thoughts(text)[:, 0], wanted)
        anchors = torch.tensor([[7, -1, 3, 3], [2, 11, 0, -1]])
        some = model.sample_thoughts(text, anchors=anchors)
        expected = wanted.gather(1, anchors.clamp_min(0)[..., None].expand(-1, -1, K))
        assert torch.equal(some, expected.masked_fill(anchors[..., None] < 0, -1))
        of_row = (wanted[0] >= 0).sum(-1)
        last = torch.stack([of_row.argmin(), of_row.argmax()])  # one of them goes on alone
        assert torch.equal(model.sample_thoughts(text[:1], anchors=last), wanted[:1, last])


def test_sampled_thoughts_in_padded_and_packed_rows(make, text):
    model = make()
    wanted = all_alone(model, text)
    padded, mask = left_padded(text)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    own = model.sample_thoughts(padded, mask, position_ids=positions)[:, 0]
    for b, row in enumerate(padded):
        first = int(mask[b].argmax())
        for i in range(first, len(row)):
            assert torch.equal(own[b, i], thinks_alone(model, row[first:], i - first))
    packed = model.sample_thoughts(text.view(1, -1), position_ids=torch.arange(12).repeat(2)[None])
    assert torch.equal(packed[0, 0], wanted.flatten(0, 1))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("window", [None, 6])
def test_predictions_are_mixed_at_each_thoughts_own_end(make, text, window, gradient):
    model = make(sliding_window=window)
    with torch.set_grad_enabled(gradient):
        output = model(text)
        given = model(text, thought_tokens=output.thought_tokens)
        uncached = model(text, thought_tokens=output.thought_tokens, use_cache=False)
        last = model(text, logits_to_keep=1)
    alone = Alone(model)
    with torch.no_grad():
        hidden = alone(alone.embed(text))[0]
        for b, i in ((b, i) for b in range(2) for i in range(12)):
            thought = output.thought_tokens[b, 0, i]
            assert torch.equal(thought, thinks_alone(model, text[b], i))
            slots = alone.thought(text[b : b + 1], i, thought[thought >= 0][None])
            expected = alone.mixed(hidden[b : b + 1, i], slots[:, -1])[0]
            for logits in (output.logits[b, i], given.logits[b, i], uncached.logits[b, i]):
                torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
    assert torch.equal(output.thought_lengths, (output.thought_tokens >= 0).sum(-1))
    torch.testing.assert_close(last.logits, output.logits[:, -1:], atol=2e-4, rtol=2e-4)
    assert torch.equal(last.thought_tokens, output.thought_tokens[:, :, -1:])


@pytest.mark.parametrize("by_the_op", [False, True], ids=["as text", "by the op"])
@pytest.mark.parametrize(
    "options", [{}, {"draft_length": 3}, {"draft_length": "auto"}, {"think": 2.5}, {"think": 2.5, "draft_length": 3}],
    ids=str,
)  # fmt: skip
def test_generation(make, text, options, by_the_op, monkeypatch):
    """Every thought is the one alone behind its text; the text is that of whole passes; and comes again."""
    if by_the_op:  # as on a GPU
        monkeypatch.setattr("quietstar.models.layouts.thoughts._TEXT_KEYS", 0)
    model = make()
    model.mixing_head[-1].weight.data *= 0.1
    output = greedy(model, text, 10, return_thoughts=True, **options)
    thoughts, thinks, texts = output.thought_tokens, output.thinks, output.sequences
    assert len(lengths(thoughts[thinks])) > 2
    for b, i in ((b, i) for b in range(2) for i in range(10)):
        before = texts[b, : 12 + i]
        if thinks[b, i]:
            assert torch.equal(thoughts[b, i], thinks_alone(model, before, len(before) - 1))
            with torch.no_grad():
                logits = model(before[None], thought_tokens=thoughts[b, i][None, None, None], logits_to_keep=1).logits
            logits[..., [START, END]] = -torch.inf
            assert int(logits[0, -1].argmax()) == texts[b, 12 + i]
        else:
            assert (thoughts[b, i] == -1).all()
        thought = output.steps(b)[i].thought
        assert thought == (thoughts[b, i][thoughts[b, i] >= 0].tolist() if thinks[b, i] else None)
    again = greedy(model, text, 10, thoughts=thoughts, return_thoughts=True)
    assert torch.equal(again.sequences, texts)
    assert torch.equal(again.thought_tokens, thoughts)
    if not options:
        assert torch.equal(greedy(model, text, 10), texts)  # transformers' own loop


def test_shuffled_thoughts_end_where_they_ended(make, text):
    model = make()
    output = greedy(model, text, 6, thoughts="shuffled", return_thoughts=True)
    for i in range(6):
        own = [thinks_alone(model, row[: 12 + i], 11 + i) for row in output.sequences]
        assert torch.equal(output.thought_tokens[:, i], torch.stack(own[::-1]))


def test_beam_search_reorders_nothing_of_a_thought(make, text):
    model = make()
    one = [model.generate(row[None], max_new_tokens=5, num_beams=3, do_sample=False) for row in text]
    both = model.generate(text, max_new_tokens=5, num_beams=3, do_sample=False)
    assert torch.equal(both, torch.cat(one))


def test_what_has_ended_costs_nothing_more(make, text, monkeypatch):
    """Rows of the decoder and of the head while thoughts are sampled for training."""
    model, steps, drawn = make(), [], []
    advance, draw = EndingThinker._advance, Head.draw

    def counted_advance(self, rows, *others):
        steps.append(rows.shape[1])
        return advance(self, rows, *others)

    def counted_draw(self, hidden, **options):
        drawn.append(len(hidden))
        return draw(self, hidden, **options)

    monkeypatch.setattr(EndingThinker, "_advance", counted_advance)
    monkeypatch.setattr(Head, "draw", counted_draw)
    thoughts = model.sample_thoughts(text)[:, 0]
    of_rows = (thoughts >= 0).sum(dim=1)  # [B, k]
    assert drawn == [24, *of_rows.sum(dim=0)[:-1].tolist()]
    assert steps == [12, *of_rows.max(dim=0).values[:-1].tolist()]


def test_a_likely_end_is_drawn_as_often_as_it_is_likely(make):
    """And never first."""
    model = make(thought_temperature=1.0, num_thoughts=400, thought_length=2)
    text = torch.randint(1, 38, (1, 4))
    thoughts = model.sample_thoughts(text)[0, :, 3]
    assert (thoughts[:, 0] >= 0).all()
    assert not (thoughts >= START).any()
    alone, expected = Alone(model), []
    with torch.no_grad():
        for token in thoughts[:, 0].unique():
            logits = alone.logits(alone.thought(text, 3, token[None, None]))[0, 1]
            logits[START] = -torch.inf
            count = (thoughts[:, 0] == token).sum()
            expected.append(logits.softmax(-1)[END] * count)
    share = float(sum(expected)) / 400
    assert 0.05 < share < 0.95
    ended = float((thoughts[:, 1] < 0).float().mean())
    assert abs(ended - share) < 4 * (share * (1 - share) / 400) ** 0.5


def test_the_same_seed_draws_the_same(make, text):
    model = make(thought_temperature=1.0)
    first, second = (model.sample_thoughts(text, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert len(lengths(first)) > 2


@pytest.mark.slow
def test_compiled_passes_think_the_same(make, text):
    """They drop nothing and wait for nothing: one graph."""
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted, output = model(text, use_cache=False), compiled(text, use_cache=False)
    assert len(lengths(wanted.thought_tokens)) > 2
    assert torch.equal(output.thought_tokens, wanted.thought_tokens)
    torch.testing.assert_close(output.logits, wanted.logits, atol=2e-4, rtol=2e-4)


def test_training_pass(make, text):
    """Sampled thoughts have the loss of given ones, and of padded ones with their lengths; all positions think."""
    model = make(num_thoughts=2, thought_temperature=1.0)
    first = model(text, labels=text)
    assert len(lengths(first.thought_tokens)) > 2
    behind = torch.arange(K) >= first.thought_lengths[..., None]
    padded = first.thought_tokens.masked_fill(behind, 7)
    for options in (
        {"thought_tokens": first.thought_tokens},
        {"thought_tokens": padded, "thought_lengths": first.thought_lengths},
    ):
        again = model(text, labels=text, **options)
        assert torch.equal(again.loss, first.loss)
        assert torch.equal(again.thought_tokens, first.thought_tokens)
    unended = behind[:, :, :-1] & (torch.arange(K) > first.thought_lengths[:, :, :-1, None])
    assert torch.equal(first.thought_logprobs == 0, unended)


def test_entropy_is_that_of_what_was_drawn(make, text, monkeypatch):
    """The end included where it was drawn, whose distribution has it; nothing behind it."""
    monkeypatch.setattr(entropy, "TOKENS", 1000)
    model = make(thought_temperature=0.8)
    output = model(text, labels=text, output_thought_entropy=True)
    alone, expected = Alone(model), []
    with torch.no_grad():
        for b, i in ((b, i) for b in range(2) for i in range(11)):
            thought = output.thought_tokens[b, 0, i]
            thought = thought[thought >= 0]
            logits = alone.logits(alone.thought(text[b : b + 1], i, thought[None]))[0, : min(K, len(thought) + 1)] / 0.8
            logits[:, START] = -torch.inf
            logits[0, END] = -torch.inf
            expected += torch.special.entr(logits.softmax(-1)).sum(-1).tolist()
    assert abs(float(output.thought_entropy) - sum(expected) / len(expected)) < 1e-4


def test_drawn_tokens():
    thoughts = torch.tensor([[1, 2, 3], [1, 2, -1], [1, -1, -1], [-1, -1, -1]])
    expected = [[1, 2, 3], [1, 2, 9], [1, 9, -100], [-100] * 3]
    assert drawn_tokens(thoughts, 9, -100).tolist() == expected


@pytest.mark.parametrize("thought", [[-1, 3, 4, 5], [3, -1, 4, 5], [-1, -1, -1, -1]], ids=str)
def test_an_end_in_front_of_tokens_is_refused(make, text, thought):
    model, thoughts = make(), torch.full((2, 1, 12, K), 5)
    thoughts[1, 0, 3] = torch.tensor(thought)
    for arguments in ({}, {"labels": text}):
        with pytest.raises(ValueError, match="thought_tokens must be -1 behind the end"):
            model(text, thought_tokens=thoughts, **arguments)
    if thought[-1] >= 0:
        with pytest.raises(ValueError, match="thoughts must be -1 behind the end"):
            model.generate(text, thoughts=thoughts[:, 0, 3], max_new_tokens=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"thought_lengths": torch.ones(2, 1, 12, dtype=torch.int64)}, "thought_tokens must be given"),
        ({"thought_lengths": torch.ones(2, 12, dtype=torch.int64)}, "thought_lengths must have the shape"),
        ({"thought_lengths": torch.full((2, 1, 12), 5)}, "thought_lengths must"),
        ({"thought_lengths": torch.zeros(2, 1, 12, dtype=torch.int64)}, "thought_tokens must be -1 behind"),
    ],
)
def test_bad_lengths_are_refused(make, text, given, message):
    if "must be given" not in message:
        given = given | {"thought_tokens": torch.full((2, 1, 12, K), 5)}
    with pytest.raises(ValueError, match=message):
        make()(text, labels=text, **given)
    fixed = make(learned_thought_end=False)
    with pytest.raises(ValueError, match="thought_lengths must be left out with learned_thought_end False"):
        fixed(text, labels=text, **given)


def test_no_end_without_a_token_to_end_behind(make):
    with pytest.raises(ValueError, match=r"thought_length must .*learned_thought_end"):
        make(thought_length=0)
