"""What is measured for a report."""

import pytest
import torch

from quietstar.evaluation import held_out_nll
from quietstar.report.reading import cut, read


@pytest.mark.parametrize(
    ("count", "width"), [(2, 9), (3, 3), (5, 3), (6, 3), (10, 4), (11, 4), (12, 4), (9, 9), (40, 7)]
)
def test_every_token_but_the_first_counts_once(count, width):
    tokens = torch.arange(100, 100 + count).tolist()
    windows, counted = cut(tokens, width)
    assert windows.shape == (len(counted), max(3, min(width, count)))
    assert windows[:, 1:][counted].tolist() == tokens[1:]
    whole = windows if count > 2 else windows[:, :2]
    assert (whole.diff() == 1).all()  # a stretch of the text
    assert len(windows) == -(-(count - 1) // (min(width, count) - 1))


def test_measures(model):
    windows = torch.randint(0, 300, (3, 9))
    state = torch.get_rng_state()
    reading = read(model, windows, seed=5, thought_lengths=[0, 1])
    assert torch.equal(torch.get_rng_state(), state)
    assert reading.counted.all()
    for found, thoughts, length in [
        (reading.own, "own", None),
        (reading.lengths[0], "own", 0),
        (reading.lengths[1], "own", 1),
        (reading.shuffled, reading.shuffled.thought_tokens, None),
        (reading.random, reading.random.thought_tokens, None),
    ]:
        expected = held_out_nll(model, windows, thoughts=thoughts, thought_length=length, seed=5)
        for name, values in expected._asdict().items():
            torch.testing.assert_close(getattr(found, name), values, msg=name)
    own, shuffled = (nll.thought_tokens.flatten(0, 2).tolist() for nll in (reading.own, reading.shuffled))
    assert sorted(own) == sorted(shuffled)
    assert own != shuffled
    assert reading.random.thought_tokens.shape == reading.own.thought_tokens.shape
    torch.testing.assert_close(reading.gains, reading.own.base - reading.own.mixed)
    again = read(model, windows, seed=5)
    assert torch.equal(again.random.thought_tokens, reading.random.thought_tokens)
    assert torch.equal(again.shuffled.thought_tokens, reading.shuffled.thought_tokens)
    other = read(model, windows, seed=6)
    assert not torch.equal(other.own.thought_tokens, reading.own.thought_tokens)
    assert not torch.equal(other.random.thought_tokens, reading.random.thought_tokens)
