"""generate() behind thoughts that are given, shuffled or random, against whole passes with the same thoughts."""

import re

import pytest
import torch
from greedy_text import greedy, left_padded
from torch.nn.functional import pad

WAYS = {
    "plain": {},
    "drafts": {"draft_length": 3},
    "drafts of any length": {"draft_length": "auto"},
    "wherever unsure": {"think": 0.0},
    "wherever unsure, drafts": {"think": 0.0, "draft_length": 3},
}


@torch.no_grad()
def recompute(model, text, thoughts, mask=None):
    """Greedy text behind thoughts [B, n, k] from the whole context at every token; −1 is the base prediction."""
    config, usual = model.config, model.config.thought_length
    config.thought_length = thoughts.shape[-1]
    for thought in thoughts.unbind(1):
        positions = None if mask is None else (mask.cumsum(dim=1) - 1).clamp_min(0)
        output = model(text, mask, positions, thought_tokens=thought.clamp_min(0)[:, None, None], logits_to_keep=1)
        hidden = model.model(text, mask, positions).last_hidden_state[:, -1]
        has_thought = (thought >= 0).all(dim=1, keepdim=True)
        logits = torch.where(has_thought, output.logits[:, -1], model.lm_head(hidden))
        logits[:, list(config.thought_token_ids)] = -torch.inf
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
        mask = None if mask is None else pad(mask, (0, 1), value=1)
    config.thought_length = usual
    return text


@torch.no_grad()
def recompute_shuffled(model, text, count, eos):
    """Greedy text, every row behind what the next row thinks; rows that have ended think behind their last token."""
    texts = [row.tolist() for row in text]
    ended = [False] * len(texts)
    thoughts = []
    for _ in range(count):
        own = [model.sample_thoughts(torch.tensor([row]), anchors=torch.tensor([len(row) - 1]))[0, 0] for row in texts]
        lent = [*own[1:], own[0]]
        thoughts.append(torch.stack(lent))
        for b in (b for b, done in enumerate(ended) if not done):
            row = recompute(model, torch.tensor([texts[b]]), lent[b][None, None])
            texts[b] = row[0].tolist()
            ended[b] = texts[b][-1] in eos
    return texts, torch.stack(thoughts, dim=1)


@pytest.mark.parametrize("shape", [(2, 2), (2, 10, 5), (2, 13, 0), (2, 10, 1)], ids=str)
@pytest.mark.parametrize(("padded", "window"), [(False, None), (True, None), (True, 6)])
def test_given_thoughts(make_model, text, padded, window, shape):
    """Of other lengths than the model's, one for all tokens or one for each, in every way to the text."""
    model = make_model(sliding_window=window)
    model.mixing_head[-1].weight.data *= 0.1  # thoughts matter, and some drafts are accepted
    inputs, mask = left_padded(text) if padded else (text, None)
    thoughts = torch.randint(1, 38, shape)
    if len(shape) == 3 and shape[-1]:
        thoughts[1, 2:6:3] = -1
    each = (thoughts if len(shape) == 3 else thoughts[:, None].expand(-1, 10, -1))[:, :10]
    wanted = recompute(model, inputs, each, mask)
    assert shape[-1] == 0 or not torch.equal(wanted, recompute(model, inputs, each.roll(1, 0), mask))
    mask = torch.ones_like(text) if mask is None else mask
    for name, options in WAYS.items():
        output = greedy(model, inputs, attention_mask=mask, thoughts=thoughts, return_thoughts=True, **options)
        assert torch.equal(output.sequences, wanted), name
        assert torch.equal(output.thought_tokens, each), name
        assert torch.equal(output.thinks, (each >= 0).all(-1)), name
        assert torch.equal(greedy(model, inputs, attention_mask=mask, thoughts=thoughts, **options), wanted), name


@pytest.mark.parametrize("options", [{}, {"think": 2.5}, {"draft_length": 3}], ids=str)
def test_what_was_thought_gives_the_text_again(make_model, text, options):
    """Also where the model did not think, and behind the end of a text."""
    model = make_model()
    eos = [*range(5, 12)]
    first = greedy(model, text, 12, return_thoughts=True, eos_token_id=eos, **options)
    count = first.thought_tokens.shape[1]
    assert len(set(first.new_tokens.tolist())) == 2
    again = greedy(model, text, count, thoughts=first.thought_tokens, eos_token_id=eos, return_thoughts=True)
    for name in ("sequences", "thinks", "thought_tokens"):
        assert torch.equal(again[name], first[name]), name
    torch.testing.assert_close(again.logprobs, first.logprobs, atol=1e-4, rtol=1e-4)


def test_returned_sequences_share_the_thoughts_of_their_prompt(make_model, text):
    thoughts = torch.randint(1, 38, (2, 4, 3))
    output = make_model().generate(
        text, max_new_tokens=4, do_sample=True, num_return_sequences=3, thoughts=thoughts, return_thoughts=True
    )
    assert torch.equal(output.thought_tokens, thoughts.repeat_interleave(3, dim=0))


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(
    ("scale", "options"),
    [*((0.1, options) for options in WAYS.values()), (0.0, {"draft_length": 8})],
    ids=[*WAYS, "drafts that are all accepted"],
)
def test_shuffled_thoughts_are_those_of_the_next_prompt(make_model, scale, options, window):
    """Rows end at different times; with drafts too, no row is lent what was thought behind text that is not kept."""
    torch.manual_seed(9)  # rows end at different times
    model = make_model(thought_temperature=0.0, sliding_window=window)
    model.mixing_head[-1].weight.data *= scale
    text, eos = torch.randint(1, 38, (3, 12)), [*range(20, 26)]
    texts, thoughts = recompute_shuffled(model, text, 12, eos)
    assert len({len(row) for row in texts}) == 3
    output = greedy(model, text, 12, thoughts="shuffled", eos_token_id=eos, return_thoughts=True, **options)
    for b, row in enumerate(texts):
        new = len(row) - 12
        assert output.sequences[b, : 12 + new].tolist() == row
        assert torch.equal(output.thought_tokens[b, :new], thoughts[b, :new])


@pytest.mark.parametrize("draft_length", [None, 3])
def test_shuffled_thoughts_where_only_some_rows_think(make_model, text, draft_length):
    """Whoever wants a thought is given one, also of a row that wants none itself."""
    model = make_model(thought_temperature=0.0)
    output = greedy(model, text, 16, thoughts="shuffled", think=2.5, draft_length=draft_length, return_thoughts=True)
    assert (output.thinks[0] != output.thinks[1]).any()
    for i, thinks in enumerate(output.thinks.T):
        own = model.sample_thoughts(output.sequences[:, : 12 + i], anchors=torch.tensor([11 + i]))[:, 0]
        assert torch.equal(output.thought_tokens[:, i], own.roll(-1, 0).masked_fill(~thinks[:, None], -1))


def test_sequences_of_one_prompt_do_not_exchange_thoughts(make_model, text):
    """Two of each prompt, which are the same here: the only token left is the likeliest."""
    model = make_model(thought_temperature=0.0)
    options = {"thoughts": "shuffled", "return_thoughts": True}
    wanted = greedy(model, text, 6, **options)
    twice = model.generate(text, max_new_tokens=6, num_return_sequences=2, do_sample=True, top_k=1, **options)
    assert torch.equal(twice.sequences, wanted.sequences.repeat_interleave(2, dim=0))
    assert torch.equal(twice.thought_tokens, wanted.thought_tokens.repeat_interleave(2, dim=0))


def test_random_thoughts(make_model, text):
    """Even over the vocabulary without the thought tokens, the same for a seed however the text is made."""
    model = make_model()
    outputs = []
    for options in WAYS.values():
        torch.manual_seed(1)
        outputs.append(greedy(model, text, 100, thoughts="random", return_thoughts=True, **options))
    for output in outputs[1:]:
        assert torch.equal(output.sequences, outputs[0].sequences)
        assert torch.equal(output.thought_tokens, outputs[0].thought_tokens)
    assert outputs[0].thinks.all()
    counts = outputs[0].thought_tokens.flatten().bincount(minlength=40)
    assert counts[38:].sum() == 0
    # Each of 38 tokens is drawn 600 / 38 = 16 times, give or take 4; five of these.
    assert ((counts[:38] - 600 / 38).abs() < 20).all()
    assert not torch.equal(greedy(model, text, 100, thoughts="random"), outputs[0].sequences)


BAD_INPUT = {
    "kind": ({"thoughts": "mine"}, ValueError, "thoughts must be 'own', 'shuffled', 'random' or a tensor, got 'mine'"),
    "type": ({"thoughts": [[1]]}, TypeError, "thoughts must be 'own', 'shuffled', 'random' or a tensor, got [[1]]"),
    "none": ({"thoughts": None}, TypeError, "thoughts must be 'own', 'shuffled', 'random' or a tensor, got None"),
    "never": ({"thoughts": "random", "think": "never"}, ValueError, "thoughts must be left out with think='never'"),
    "never, given": (
        {"thoughts": torch.ones(2, 3, dtype=torch.int64), "think": "never"},
        ValueError,
        "thoughts must be left out with think='never', got a tensor",
    ),
    "alone": (
        {"thoughts": "shuffled", "inputs": torch.ones(1, 4, dtype=torch.int64)},
        ValueError,
        "thoughts must not be 'shuffled' with a single prompt",
    ),
    "alone, several sequences": (
        {"thoughts": "shuffled", "inputs": torch.ones(1, 4, dtype=torch.int64), "num_return_sequences": 2,
         "do_sample": True},
        ValueError,
        "thoughts must not be 'shuffled' with a single prompt",
    ),
    "rows": (
        {"thoughts": torch.ones(3, 2, dtype=torch.int64)},
        ValueError,
        "thoughts must have shape [2, k], or [2, n, k] with n >= 3 new tokens, got [3, 2]",
    ),
    "too few": ({"thoughts": torch.ones(2, 2, 5, dtype=torch.int64)}, ValueError, "n >= 3 new tokens, got [2, 2, 5]"),
    "a vector": ({"thoughts": torch.ones(2, dtype=torch.int64)}, ValueError, "thoughts must have shape [2, k]"),
    "four": ({"thoughts": torch.ones(2, 1, 3, 5, dtype=torch.int64)}, ValueError, "thoughts must have shape [2, k]"),
    "dtype": ({"thoughts": torch.ones(2, 5)}, TypeError, "thoughts must"),
    "range": ({"thoughts": torch.full((2, 5), 40)}, ValueError, "thoughts must"),
    "below": ({"thoughts": torch.full((2, 5), -2)}, ValueError, "thoughts must"),
    "half": ({"thoughts": torch.tensor([[1, -1], [1, 1]])}, ValueError, "thoughts must be -1 in all of their tokens"),
    "beams": ({"thoughts": "random", "num_beams": 2}, ValueError, "num_beams must be 1 with thoughts, got beam"),
    "lookup": ({"thoughts": "random", "prompt_lookup_num_tokens": 2, "inputs": torch.ones(1, 4, dtype=torch.int64)},
               ValueError, "assistant_model and prompt lookup must be left out with"),
    "scores": (
        {"thoughts": "random", "output_scores": True, "return_dict_in_generate": True},
        ValueError,
        "output_scores must be left out with thoughts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_thoughts_are_named(make_model, text, name):
    arguments, error, message = BAD_INPUT[name]
    with pytest.raises(error, match=re.escape(message)):
        make_model().generate(**{"inputs": text, "max_new_tokens": 3} | arguments)
