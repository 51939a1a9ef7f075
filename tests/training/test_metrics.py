"""Means over tokens with a label, against loops over single tokens."""

import math

import pytest
import torch

from quietstar.training.metrics import Stopwatch, ThoughtMetrics


def test_only_tokens_with_a_label_count(make_model):
    model, metrics = make_model(), ThoughtMetrics()
    input_ids = torch.randint(1, 38, (2, 9))
    labels = input_ids.clone()
    labels[0, 4] = -100
    mask = torch.ones_like(input_ids)
    mask[1, 6:] = 0
    entries = {name: [] for name in ("base_nll", "talk_nll_0", "talk_nll_1", "talk_nll_2", "reward", "mixing_weight")}
    entries |= {"advantage_mean": [], "distinct_thoughts": [], "thought_entropy": []}
    for _ in range(2):
        thoughts = torch.randint(1, 4, (2, 2, 9, 2))  # many are equal
        output = model(
            input_ids, attention_mask=mask, labels=labels, thought_tokens=thoughts, output_thought_entropy=True
        )
        metrics.add(output, labels, mask)
        different = set()
        has_label = [[t < 9 and bool(mask[b, t]) and labels[b, t] != -100 for t in range(12)] for b in range(2)]
        for b, i in ((b, i) for b in range(2) for i in range(8)):
            if has_label[b][i + 1]:
                entries["base_nll"].append(output.base_nll[b, i])
            if i < 5 and any(has_label[b][i + 1 : i + 4]):
                reward = output.reward[b, :, i]
                entries["reward"] += list(reward)
                entries["advantage_mean"] += list((reward - reward.mean()).clamp_min(0))
            if any(has_label[b][i + 1 : i + 4]):
                for thought in output.thought_tokens[b, :, i].tolist():
                    entries["distinct_thoughts"].append(torch.tensor(float(tuple(thought) not in different)))
                    entries["thought_entropy"].append(output.thought_entropy)
                    different.add(tuple(thought))
            for m in range(3):
                if has_label[b][i + 1 + m]:
                    entries[f"talk_nll_{m}"] += list(output.talk_nll[b, :, i, m])
                    entries["mixing_weight"] += list(output.mixing_weight[b, :, i, m])
    means, tokens = metrics.means(metrics.totals())
    assert tokens == len(entries["base_nll"]) == 24
    for name, values in entries.items():
        assert means[name] == pytest.approx(float(torch.stack(values).mean()), rel=1e-5), name
    spread = torch.stack(entries["advantage_mean"]).std(correction=0)
    assert means["advantage_std"] == pytest.approx(float(spread), rel=1e-5)
    assert 0 < means["distinct_thoughts"] < 1
    assert means.keys() == entries.keys() | {"advantage_std", "policy_loss"}


def test_lengths_of_thoughts_that_end_themselves(make_model):
    """Of those with something to predict; the last position has nothing."""
    model, metrics = make_model(thought_length=3, learned_thought_end=True, num_thoughts=1), ThoughtMetrics()
    input_ids = torch.randint(1, 38, (2, 9))
    lengths = torch.tensor([[1, 2, 3, 1, 1, 3, 2, 1, 3], [2, 2, 2, 2, 2, 2, 2, 2, 3]])
    thoughts = torch.full((2, 1, 9, 3), 5).masked_fill(torch.arange(3) >= lengths[:, None, :, None], -1)
    metrics.add(model(input_ids, labels=input_ids, thought_tokens=thoughts, output_thought_entropy=True), input_ids)
    means, _ = metrics.means(metrics.totals())
    assert means["thought_length"] == pytest.approx((14 + 16) / 16)
    assert means["distinct_thoughts"] == pytest.approx(3 / 16)


@pytest.mark.parametrize("k", [1, 3])
def test_collapse_shows(make_model, k):
    """A model that thinks the same everywhere, all but surely."""
    model, metrics = make_model(thought_length=k), ThoughtMetrics()
    input_ids = torch.randint(1, 38, (2, 9))
    model.lm_head.weight.data[5] = 30 * model.model.norm.weight.data  # on hidden states that all point its way
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *call: call[-1].abs())
    metrics.add(model(input_ids, labels=input_ids, output_thought_entropy=True), input_ids)
    means, _ = metrics.means(metrics.totals())
    assert means["distinct_thoughts"] == pytest.approx(1 / (2 * 2 * 8))
    assert 0 <= means["thought_entropy"] < 1e-3


def test_thoughts_without_tokens_are_not_spoken_of(make_model):
    model, metrics = make_model(thought_length=0), ThoughtMetrics()
    input_ids = torch.randint(1, 38, (2, 9))
    metrics.add(model(input_ids, labels=input_ids, output_thought_entropy=True), input_ids)
    means, _ = metrics.means(metrics.totals())
    assert not means.keys() & {"thought_entropy", "distinct_thoughts"}
    assert all(map(math.isfinite, means.values()))


def test_totals_start_again(make_model):
    model, metrics = make_model(), ThoughtMetrics()
    input_ids = torch.randint(1, 38, (1, 9))
    for length in (9, 7):
        metrics.add(model(input_ids[:, :length], labels=input_ids[:, :length]), input_ids[:, :length])
        assert metrics.means(metrics.totals())[1] == length - 1


def test_stopwatch_leaves_out_pauses(monkeypatch):
    seconds = iter([0.0, 2.0, 10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    stopwatch = Stopwatch()
    stopwatch.start()
    stopwatch.pause()
    stopwatch.pause()  # already paused: no clock is read
    stopwatch.start()
    stopwatch.start()  # already running
    assert stopwatch.lap() == 5.0
    stopwatch.start()
    assert stopwatch.lap() == 1.0
