"""Greedy text, by generate() and by a loop of forward passes."""

import torch
from torch.nn.functional import pad


def recompute(model, text, count, mask=None):
    """Greedy continuation from the whole context at every token, no cache."""
    for _ in range(count):
        positions = None if mask is None else (mask.cumsum(dim=1) - 1).clamp_min(0)
        logits = model(text, mask, positions, suppress_thought_tokens=True, use_cache=False).logits[:, -1]
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
        mask = None if mask is None else pad(mask, (0, 1), value=1)
    return text


def left_padded(text):
    """The batch with the first 5 tokens of its second row taken for padding, and its mask."""
    mask = torch.ones_like(text)
    mask[1, :5] = 0
    return text * mask, mask


def greedy(model, text, count=10, **options):
    with torch.no_grad():
        return model.generate(text, attention_mask=options.pop("attention_mask", torch.ones_like(text)),
                              max_new_tokens=count, do_sample=False, **options)  # fmt: skip


# Few drafts are accepted at the mixing weight of most tests, about half of them at this one.
SOME_ACCEPTED = 0.02
