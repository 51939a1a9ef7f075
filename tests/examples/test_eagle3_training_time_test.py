"""The EAGLE-3 example: its unrolled steps are those of a dense mask, and its draft head learns."""

import pytest
import torch
from torch.nn import functional as F


def dense_attention(query, key, value, own_key, own_value):
    """All keys side by side under one mask, as in the drawing: step 0 up to the position, then every own step's key."""
    length, steps = own_key.shape[2:4]
    keys = torch.cat([key, *own_key.unbind(3)], dim=2)
    values = torch.cat([value, *own_value.unbind(3)], dim=2)
    same = torch.eye(length, dtype=torch.bool)
    mask = torch.cat([same.new_ones(length, length).tril(), *[same] * steps], dim=1)
    output = F.scaled_dot_product_attention(query[:, :, :, 0], keys, values, attn_mask=mask, enable_gqa=True)
    return output[:, :, :, None]


def drafted_alone(example, head, features, tokens, position, steps):
    """Outputs of all steps at one position as a decoder drafts: one query at a time, a growing cache, no mask."""
    state, position_ids = head.fuse(features[:, : position + 1]), torch.arange(position + 1)
    token = tokens[:, : position + 1]
    keys, values, outputs = [], [], []
    for n in range(steps):
        x = torch.cat([head.norm_token(token), head.norm_state(state)], dim=-1)
        query, key, value = (head.heads(project(x)) for project in (head.query, head.key, head.value))
        keys.append(example.rotate(key, position_ids))
        values.append(value)
        query = example.rotate(query, position_ids)[:, :, -1:]
        attended = F.scaled_dot_product_attention(query, torch.cat(keys, 2), torch.cat(values, 2), enable_gqa=True)
        state = state[:, -1:] + head.out(attended.transpose(1, 2).flatten(2))
        state = state + head.mlp(head.norm_mlp(state))
        outputs.append(head.norm_out(state))
        position_ids, token = position_ids[-1:] + 1, tokens[:, position + n + 1][:, None]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("other", ["a dense mask", "one draft at a time"])
def test_steps_and_gradients_are_those_of(other, example, monkeypatch, assert_same):
    hidden, levels, length, steps = 16, 2, 7, 4
    head = example.DraftHead(hidden, heads=4, kv_heads=2, levels=levels).double()
    features = torch.randn(2, length, levels * hidden, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, length + steps, hidden, dtype=torch.float64, requires_grad=True)
    leaves = [features, tokens, *head.parameters()]

    def unrolled():
        return torch.stack(head.unroll(features, tokens, steps), dim=2)

    actual = unrolled()
    if other == "a dense mask":
        monkeypatch.setattr(example, "thought_attention", dense_attention)
        expected = unrolled()
    else:
        expected = [drafted_alone(example, head, features, tokens, i, steps) for i in range(length)]
        expected = torch.stack(expected, dim=1)
    assert_same(actual, expected, leaves)


def saved_bytes(run):
    """Memory that autograd keeps alive for the backward of ``run()``, every byte once."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    assert result is not None  # alive until here
    return sum(storages.values())


def test_a_step_copies_none_of_the_earlier_ones(example, monkeypatch):
    """What a backward needs grows by the same amount from step to step; with stacked keys it grows ever faster."""
    head, length = example.DraftHead(16, heads=4, kv_heads=2, levels=2), 32
    features, tokens = torch.randn(1, length, 32), torch.randn(1, length + 16, 16)

    def growth():
        saved = [saved_bytes(lambda n=n: head.unroll(features, tokens, n)) for n in (3, 8, 13)]
        return saved[1] - saved[0], saved[2] - saved[1]

    assert len(set(growth())) == 1
    monkeypatch.setattr(example.Room, "append", stacking)
    first, second = growth()
    copied = 2 * 2 * length * 4 * 4  # keys and values of 2 heads of 4 float32, for a step that copies a step
    assert second - first == copied * (sum(range(8, 13)) - sum(range(3, 8)))


def stacking(room, step):
    room.used = torch.cat([room.used, step[:, :, :, None]], dim=3)
    return room.used


def test_the_head_learns_to_draft(example, capsys):
    before, after = example.main(["--model-updates", "40", "--draft-updates", "25"])
    assert after.mean() > before.mean() + 0.1
    assert len(capsys.readouterr().out.splitlines()) == 1 + example.STEPS
