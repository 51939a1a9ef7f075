"""The curve over the share of positions that think, against loops over single predictions."""

import pytest
import torch

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.evaluation import held_out_nll, thinking_curve

SHARES = (0.0, 0.25, 0.5, 1.0)


@pytest.fixture
def learner(model):
    """The model of these tests, with a gain head."""
    learner = QuietStarForCausalLM(QuietStarConfig.from_dict(model.config.to_dict() | {"gain_weight": 1.0}))
    learner.load_state_dict(model.state_dict(), strict=False)
    torch.nn.init.normal_(learner.gain_head[-1].weight, std=0.3)
    return learner.eval()


@pytest.fixture
def windows():
    return torch.randint(1, 38, (4, 9))


@torch.no_grad()
def literal(model, windows):
    """Scores of all tokens by way, and nll and right answers without and after a thought, each [windows, L−1]."""
    thoughts = held_out_nll(model, windows).thought_tokens  # the same, drawn with the same seed
    hidden = model.model(windows).last_hidden_state[:, :-1]
    logits, following = model.lm_head(hidden), windows[:, 1:]
    logits_of_text = logits[..., :38]  # the thought tokens are the last two of 40
    scores = {
        "learned": model.gain_head(hidden),
        "entropy": torch.distributions.Categorical(logits=logits_of_text).entropy(),
    }
    base = -logits.log_softmax(-1).gather(-1, following[..., None])[..., 0]
    mixed, right = [], []
    for n in range(2):
        after = model(windows, thought_tokens=thoughts[:, n, None]).logits[:, :-1]
        mixed.append(-after.log_softmax(-1).gather(-1, following[..., None])[..., 0])
        right.append((after[..., :38].argmax(-1) == following).float())
    return scores, (base, torch.stack(mixed).mean(0)), (
        (logits_of_text.argmax(-1) == following).float(), torch.stack(right).mean(0)
    )  # fmt: skip


@pytest.mark.parametrize("measured", ["all tokens", "some"])
def test_is_that_of_thinking_where_the_score_is_highest(learner, windows, measured):
    chosen = None if measured == "all tokens" else torch.rand(4, 8) < 0.5
    curve = thinking_curve(learner, windows, shares=SHARES, chosen=chosen, batch_size=4)
    scores, nll, right = literal(learner, windows)
    assert curve.keys() == {"learned", "entropy", "random"}
    where = slice(None) if chosen is None else chosen
    for way, score in scores.items():
        for point, share in zip(curve[way], SHARES, strict=True):
            count = round(share * 32)
            thinks = torch.zeros(32, dtype=torch.bool)
            thinks[score.flatten().topk(count).indices] = True
            thinks = thinks.view(4, 8)
            assert point.share == share
            assert torch.equal(score > point.threshold + 1e-6, thinks)
            assert point.nll.value == pytest.approx(float(torch.where(thinks, *nll[::-1])[where].mean()), abs=1e-5)
            assert point.accuracy.value == pytest.approx(float(torch.where(thinks, *right[::-1])[where].mean()))
    ends = [[(p.nll.value, p.accuracy.value) for p in (points[0], points[-1])] for points in curve.values()]
    assert ends[0] == ends[1] == ends[2]
    assert curve["random"][1].nll.value != curve["learned"][1].nll.value


def test_a_model_without_a_gain_head_has_two_ways_and_is_left_as_it_was(model, windows):
    model.train()
    before, state = model.config.to_dict(), torch.get_rng_state()
    curves = [thinking_curve(model, windows, batch_size=3) for _ in range(2)]
    assert curves[0] == curves[1]  # seeded
    assert curves[0].keys() == {"entropy", "random"}
    assert [point.share for point in curves[0]["random"]] == pytest.approx([i / 16 for i in range(17)])
    assert model.config.to_dict() == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": [0.5, 1.5]}, r"shares must be in \[0, 1\], got 1.5"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer in"),
        ({"windows": torch.ones(3, dtype=torch.int64)}, r"windows must have shape \[windows, L\]"),
        ({"chosen": torch.ones(4, 9, dtype=torch.bool)}, r"chosen must have shape \[4, 8\], got \[4, 9\]"),
    ],
)
def test_bad_arguments_are_named(model, windows, arguments, message):
    with pytest.raises(ValueError, match=message):
        thinking_curve(model, **{"windows": windows} | arguments)
