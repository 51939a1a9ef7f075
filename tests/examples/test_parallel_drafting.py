"""The example of parallel drafting: its chains are those of a dense mask, and its drafter learns."""

import torch


def test_chains_and_gradients_are_those_of_a_dense_mask(example, monkeypatch, dense_attention, assert_same):
    drafter = example.ParallelDrafter(hidden=16, heads=4, kv_heads=2, levels=2).double()
    features = torch.randn(2, 6, 32, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([[3, 0, 1, 2, 3, 0], [0, 2, 2, 3, 1, 1]])
    exists = (torch.arange(example.DEPTH + 1) <= lengths[..., None])[..., None]

    def outputs():
        return drafter(features, tokens, lengths) * exists

    actual = outputs()
    monkeypatch.setattr(example, "thought_attention", dense_attention)
    assert_same(actual, outputs(), [features, tokens, *drafter.parameters()])


def test_every_depth_keeps_a_share_of_the_one_before(example):
    lengths = example.falling_lengths((200, 500))
    for depth in range(1, example.DEPTH + 1):
        assert abs((lengths >= depth).float().mean() - example.KEPT**depth) < 0.01


def test_the_drafter_learns(example, capsys):
    before, after = example.main(["--model-updates", "40", "--draft-updates", "25"])
    assert after.mean() > before.mean() + 0.1
    assert len(capsys.readouterr().out.splitlines()) == 2 + example.DEPTH
