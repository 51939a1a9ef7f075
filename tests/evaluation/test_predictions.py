"""Predictions after thinking where that is wanted, against those with and without thoughts."""

import pytest
import torch

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.evaluation.predictions import next_token_logits


@torch.no_grad()
@pytest.mark.parametrize("place", ["config", "generation_config"])
def test_thinks_where_the_gain_head_expects_more_than_the_models_threshold(model, place):
    fields = {"gain_weight": 1.0, "thought_temperature": 0.0}
    learner = QuietStarForCausalLM(QuietStarConfig.from_dict(model.config.to_dict() | fields)).eval()
    for head in (learner.gain_head, learner.mixing_head):
        torch.nn.init.normal_(head[-1].weight)
    text, positions = torch.randint(1, 38, (3, 10)), torch.arange(2, 10)
    expected = learner.gain_head(learner.model(text).last_hidden_state[:, positions])
    threshold = float(expected.flatten().sort().values[11:13].mean())  # half of them
    getattr(learner, place).gain_threshold = threshold
    ways = {think: next_token_logits(learner, text, positions, think) for think in ("learned", "always", "never")}
    wanted = torch.where((expected > threshold)[..., None], ways["always"], ways["never"])
    torch.testing.assert_close(ways["learned"], wanted, rtol=1e-4, atol=1e-4)
    assert (ways["always"] - ways["never"]).abs().amax(-1).min() > 0.01


def test_a_model_without_a_gain_head_refuses(model):
    with pytest.raises(ValueError, match=r"gain_weight must be > 0 .*think='learned'"):
        next_token_logits(model.eval(), torch.randint(1, 38, (1, 4)), torch.arange(4), "learned")
