"""The example of block drafting: its blocks are those of a dense mask, and its drafter learns."""

import torch


def test_blocks_and_gradients_are_those_of_a_dense_mask(example, monkeypatch, dense_attention, assert_same):
    drafter = example.BlockDrafter(hidden=16, heads=4, kv_heads=2, levels=2).double()
    features = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    known = torch.randn(2, 4, 16, dtype=torch.float64, requires_grad=True)
    anchors = torch.tensor([[8, 2, 2, 0], [1, 7, 5, 6]])  # unsorted, repeated, so close that blocks overlap
    actual = drafter(features, known, anchors)
    monkeypatch.setattr(example, "thought_attention", dense_attention)
    assert_same(actual, drafter(features, known, anchors), [features, known, *drafter.parameters()])


def test_the_drafter_learns(example, capsys):
    before, after = example.main(["--model-updates", "40", "--draft-updates", "25"])
    assert after.mean() > before.mean() + 0.1
    assert len(capsys.readouterr().out.splitlines()) == 1 + example.BLOCK
