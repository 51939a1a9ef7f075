"""generate() of transformers with thoughts inside."""

import pytest
import torch
from transformers import TextStreamer


def recompute(model, text, count):
    """Greedy continuation from the whole context at every token, no cache."""
    for _ in range(count):
        logits = model(text, suppress_thought_tokens=True, use_cache=False).logits[:, -1]
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    return text


def greedy(model, text, count=10, **options):
    with torch.no_grad():
        return model.generate(text, attention_mask=options.pop("attention_mask", torch.ones_like(text)),
                              max_new_tokens=count, do_sample=False, **options)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("window", [None, 6])
def test_greedy_equals_recomputing_everything(make_model, text, window, options):
    if window and options.get("cache_implementation") == "static":
        window = None
    model = make_model(thought_temperature=0.0, sliding_window=window)
    with torch.no_grad():
        wanted = recompute(model, text, 10)
    assert torch.equal(greedy(model, text, **options), wanted)


@pytest.mark.parametrize("window", [None, 6])
def test_left_padded_rows_equal_the_prompt_alone(make_model, text, window):
    model = make_model(thought_temperature=0.0, sliding_window=window)
    alone = greedy(model, text[1:, 5:])[:, 7:]
    batch = text.clone()
    batch[1, :5] = 0
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    together = greedy(model, batch, attention_mask=mask)[:, 12:]
    assert torch.equal(together[1:], alone)
    assert torch.equal(together[:1], greedy(model, text[:1])[:, 12:])


def test_thought_tokens_are_never_generated(make_model, text):
    model = make_model()
    model.lm_head.weight.data[-2:] = 100 * model.model.norm.weight  # the model would like nothing better
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 2.0}, {"do_sample": True, "top_k": 1}):
        output = model.generate(text, max_new_tokens=20, return_thoughts=True, **options)
        assert int(output.sequences.max()) < 38
        assert int(output.thought_tokens.max()) < 38


def test_the_same_seed_gives_the_same_text(make_model, text):
    model = make_model()
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=12, do_sample=True))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_thoughts_in_view(make_model, text):
    model = make_model(thought_temperature=0.0)
    output = model.generate(text, max_new_tokens=5, do_sample=False, return_thoughts=True)
    assert torch.equal(output.sequences, greedy(model, text, 5))
    assert output.thought_tokens.shape == (2, 5, 3)
    assert output.mixing_weight.shape == (2, 5)
    with torch.no_grad():
        whole = model(output.sequences)
    assert torch.equal(output.thought_tokens, whole.thought_tokens[:, 0, 11:-1])
    torch.testing.assert_close(output.mixing_weight, whole.mixing_weight[:, 0, 11:-1, 0], atol=1e-3, rtol=1e-3)


def test_streamer_num_return_sequences_and_beams(make_model, text):
    model = make_model(thought_temperature=0.0)

    class Tokens(TextStreamer):
        def __init__(self):
            self.received = []

        def put(self, value):
            self.received += value.flatten().tolist()

        def end(self):
            self.received.append("end")

    streamer = Tokens()
    output = greedy(model, text[:1], 5, streamer=streamer)
    assert streamer.received == [*output[0].tolist(), "end"]
    several = model.generate(
        text, attention_mask=torch.ones_like(text), max_new_tokens=4, do_sample=True, num_return_sequences=3
    )
    assert several.shape == (6, 16)
    assert greedy(model, text, 4, num_beams=2).shape == (2, 16)
