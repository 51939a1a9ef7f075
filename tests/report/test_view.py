"""What the page shows of every token."""

from itertools import chain

import pytest
import torch
from hostile_text import HOSTILE

from quietstar.report import pieces
from quietstar.report.reading import cut, read
from quietstar.report.view import token_view


def test_one_text_in_windows(model, tokenizer):
    tokens = tokenizer(HOSTILE)["input_ids"]
    windows, counted = cut(tokens, 50)
    reading = read(model, windows, counted, seed=0)
    view = token_view(tokenizer, reading, joined=True)
    assert len(view.blocks) == len(windows) > 3
    shown = list(chain(*view.blocks))
    assert "".join(token.text for token in shown) == pieces.visible(HOSTILE)
    assert shown[0].gain is None
    assert view.data["rows"][0] is None
    strings, rows = view.data["strings"], view.data["rows"][1:]
    assert [strings[row[0]] for row in rows] == [pieces.name(tokenizer, token) for token in tokens[1:]]
    assert len(set(strings)) <= len(strings) < len(tokens) * 3

    columns = [column[counted] for column in (reading.own.mixing_weight, -reading.own.base, -reading.own.mixed)]
    for place, column in enumerate(columns, start=2):
        assert [row[place] for row in rows] == pytest.approx(column.tolist(), abs=1e-4)
    thoughts = reading.own.thought_tokens[:, 0, :-1][counted]
    assert [strings[row[1]] for row in rows] == [pieces.thought(tokenizer, thought) for thought in thoughts.tolist()]
    for first, name in ((5, "base"), (11, "mixed")):
        likeliest = getattr(reading.likeliest, f"{name}_tokens"), getattr(reading.likeliest, f"{name}_logprobs")
        best, logprobs = (column.reshape(*counted.shape, 3)[counted] for column in likeliest)
        assert [strings[row[first]] for row in rows] == [pieces.name(tokenizer, token) for token in best[:, 0].tolist()]
        assert [row[first + 1 : first + 6 : 2] for row in rows] == [
            pytest.approx(values, abs=1e-4) for values in logprobs.tolist()
        ]

    gains = reading.gains[counted]
    assert [token.gain for token in shown[1:]] == pytest.approx(gains.tolist())
    ordered = gains.sort().values.tolist()
    most = [gain for gain in ordered[:-7:-1] if gain > view.scale / 8]  # what is shaded
    least = [gain for gain in ordered[:6] if gain < -view.scale / 8]
    assert most
    assert least
    assert [token.gain for _, token in view.most] == pytest.approx(most)
    assert [token.gain for _, token in view.least] == pytest.approx(least)
    assert all(shown[place] == token for place, token in view.most + view.least)


def test_thoughts_that_ended_are_shown_without_what_is_missing(model, tokenizer):
    windows = torch.tensor([tokenizer("the cat sat on the mat")["input_ids"]])
    reading = read(model, windows, seed=0)
    reading.own.thought_tokens[..., 1:] = -1
    view = token_view(tokenizer, reading, joined=True)
    shown = [view.data["strings"][row[1]] for row in view.data["rows"][1:]]
    assert shown == [pieces.thought(tokenizer, [token]) for token in reading.own.thought_tokens[0, 0, :-1, 0].tolist()]


def test_windows_that_are_texts_of_their_own(model, tokenizer):
    windows = torch.tensor([tokenizer(text)["input_ids"] for text in ("é the cat", "à the mat")])
    view = token_view(tokenizer, read(model, windows, seed=0), joined=False)
    assert ["".join(token.text for token in block) for block in view.blocks] == ["é the cat", "à the mat"]
    assert [block[0].gain for block in view.blocks] == [None, None]
    assert len(token_view(tokenizer, read(model, windows, seed=0), joined=False, windows=1).blocks) == 1


@pytest.mark.parametrize(
    ("largest", "scale", "style"), [(3.4, 5, "up3"), (0.0, 0.01, ""), (0.02, 0.02, "up4"), (1e4, 500, "up4")]
)
def test_shades_span_the_gains(model, tokenizer, largest, scale, style):
    windows = torch.tensor([tokenizer("the cat sat")["input_ids"]])
    reading = read(model, windows, seed=0)
    nll = torch.full_like(reading.own.base, largest)
    view = token_view(tokenizer, reading._replace(own=reading.own._replace(base=nll, mixed=0 * nll)), joined=True)
    assert view.scale == pytest.approx(scale)
    assert {token.style for token in view.blocks[0][1:]} == {style}
    assert bool(view.most) == bool(style)
    assert not view.least


def test_numbers_that_are_none(model, tokenizer):
    windows = torch.tensor([tokenizer("the cat sat")["input_ids"]])
    reading = read(model, windows, seed=0)
    mixed = reading.own.mixed.clone()
    mixed[0, 0] = torch.inf
    view = token_view(tokenizer, reading._replace(own=reading.own._replace(mixed=mixed)), joined=True)
    assert view.data["rows"][1][4] is None
    assert view.blocks[0][1].style == ""
