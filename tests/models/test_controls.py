"""Thoughts that should not help."""

import torch

from quietstar.evaluation import random_thoughts, shuffle_thoughts


def test_shuffled_thoughts_all_move_and_stay_together():
    thoughts = torch.arange(2 * 3 * 4 * 2).reshape(2, 3, 4, 2)
    for _ in range(20):
        shuffled = shuffle_thoughts(thoughts)
        assert (shuffled != thoughts).all()
        assert torch.equal(shuffled.sort().values.flatten().sort().values, thoughts.flatten())
        assert (shuffled - shuffled[:, :1, :, :1] == thoughts - thoughts[:, :1, :, :1]).all()


def test_only_the_chosen_positions_exchange_theirs():
    thoughts = torch.arange(24).reshape(2, 1, 4, 3)
    chosen = torch.tensor([[True, False, False, True], [False, True, False, False]])
    shuffled = shuffle_thoughts(thoughts, chosen)
    assert torch.equal((shuffled == thoughts).all(-1)[:, 0], ~chosen)
    assert sorted(shuffled[:, 0][chosen].flatten().tolist()) == sorted(thoughts[:, 0][chosen].flatten().tolist())


def test_random_thoughts_are_any_token_but_those_left_out():
    tokens = random_thoughts((20, 5, 10, 2), vocabulary=12, left_out=(3, 11))
    assert tokens.shape == (20, 5, 10, 2)
    counts = tokens.flatten().bincount(minlength=12)
    assert counts[[3, 11]].sum() == 0
    # Each of ten tokens is drawn 200 times, give or take sqrt(200 · 0.9) = 13; five of these.
    assert ((counts[[0, 1, 2, *range(4, 11)]] - 200).abs() < 67).all()
