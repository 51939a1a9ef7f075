"""The cache layer that grows in place."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from quietstar.models import generation
from quietstar.models.cache import GrowingLayer, grow_in_place


def test_holds_what_the_layer_of_transformers_holds():
    """Through all that may be done to a layer, and whatever was written into the room behind it."""
    ours, theirs = GrowingLayer(), DynamicLayer()
    steps = [
        lambda _: None,
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.reorder_cache(torch.tensor([3, 0, 0, 1])),
        lambda layer: layer.crop(-2),
        lambda layer: layer.batch_select_indices(torch.tensor([2, 1])),
    ]
    for step in steps * 2:
        for new in (3, 1, 150, 1):
            batch = len(ours.keys) if ours.get_seq_length() else 2
            states = torch.randn(batch, 2, new, 4), torch.randn(batch, 2, new, 5)
            for seen, wanted in zip(ours.update(*states), theirs.update(*states), strict=True):
                assert torch.equal(seen, wanted)
            room = ours.with_room(100)
            for states, kept in zip(room, (theirs.keys, theirs.values), strict=True):
                assert torch.equal(states[:, :, :-100], kept)
                assert states[:, :, -100:].isfinite().all()
                states[:, :, -100:] = 7
        for layer in (ours, theirs):
            step(layer)


def test_a_token_moves_nothing():
    layer = GrowingLayer()
    layer.update(*torch.randn(2, 1, 2, 40, 4))
    address = layer.keys.data_ptr()
    for _ in range(30):
        layer.update(*torch.randn(2, 1, 2, 1, 4))
    assert layer.keys.data_ptr() == layer.with_room(3)[0].data_ptr() == address


def test_only_plain_dynamic_caches_grow_in_place(make_model):
    sliding = DynamicCache(config=make_model(sliding_window=6).config)
    plain = DynamicCache(config=make_model().config)
    for cache in (sliding, plain):
        grow_in_place(cache)
    assert not any(isinstance(layer, GrowingLayer) for layer in sliding.layers)
    assert all(isinstance(layer, GrowingLayer) for layer in plain.layers)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_generates_the_same(make_model, text, monkeypatch, options):
    model = make_model(thought_temperature=0.0)
    with torch.no_grad():
        ours = [model.generate(row[None], max_new_tokens=12, do_sample=False, **options) for row in text]
        monkeypatch.setattr(generation, "grow_in_place", lambda _: None)
        theirs = [model.generate(row[None], max_new_tokens=12, do_sample=False, **options) for row in text]
    assert torch.equal(torch.cat(ours), torch.cat(theirs))
