"""The sequential baseline of the benchmarks gives the authors' own numbers."""

import json
import os
from pathlib import Path

import pytest
import torch
from baselines import IGNORE, authors_weights, model_weights, sequential_next_logits, sequential_training_step
from safetensors import safe_open
from transformers import MistralConfig

from quietstar import QuietStarConfig, QuietStarForCausalLM

FIXTURES = Path(os.environ.get("QUIETSTAR_PARITY_DIR", Path(__file__).parent.parent / "fixtures" / "parity"))
VALUE = {"rtol": 0, "atol": 2e-5}  # losses and rewards are of order 1 to 10
PADDING = 0


def load(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["meta"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def config_of(meta):
    return MistralConfig(
        **meta["config"],
        thought_length=meta["n_ahead"] - 3,
        lookahead=meta["n_ahead_talk"],
        num_thoughts=meta["n_passes"],
        start_thought_token_id=meta["start_token_id"],
        end_thought_token_id=meta["end_token_id"],
        policy_temperature=meta["reinforce_temperature"],
        policy_weight=meta["policy_loss_beta"],
        base_loss_weight=meta["original_loss_weight"],
        embedding_scale=meta["embedding_scale"],
    )


every_file = pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.safetensors")), ids=lambda path: path.stem)


@every_file
def test_sequential_baseline_parity(path):
    meta, expected = load(path)
    leaves = {
        name.removeprefix("weights."): tensor.requires_grad_()
        for name, tensor in expected.items()
        if name.startswith("weights.")
    }
    ids, attention_mask = expected["input_ids"], expected["attention_mask"]
    step = sequential_training_step(
        authors_weights(leaves),
        config_of(meta),
        ids,
        ids.masked_fill(ids == PADDING, IGNORE),
        attention_mask=attention_mask,
        thought_tokens=expected["thought_tokens"],
    )

    torch.testing.assert_close(step.base_nll, expected["loss.base"], **VALUE)
    for m in range(meta["n_ahead_talk"]):
        wanted = expected[f"loss.talk.{m}"]
        torch.testing.assert_close(step.talk_nll[:, : wanted.shape[1], m], wanted, **VALUE)
    if meta["mode"] == "eval":
        return
    torch.testing.assert_close(step.reward, expected["reward"], **VALUE)
    real = attention_mask.repeat_interleave(meta["n_passes"], dim=0)[:, :-1].bool()
    for t, logprob in enumerate(step.thought_logprobs):
        torch.testing.assert_close(logprob[:, :-1][real], expected[f"thought_logprob.{t}"][real], **VALUE)
    torch.testing.assert_close(step.policy_loss, expected["policy_loss"][0], **VALUE)
    torch.testing.assert_close(step.loss, expected["loss"][0], rtol=1e-5, atol=VALUE["atol"])

    step.loss.backward()
    for name, leaf in leaves.items():
        wanted = expected[f"grad.{name}"]
        assert (leaf.grad - wanted).norm() <= 1e-5 * wanted.norm(), f"gradient of {name}"


@every_file
def test_sampled_thoughts_are_what_the_losses_are_of(path):
    meta, expected = load(path)
    config, ids = config_of(meta), expected["input_ids"]
    weights = authors_weights({n.removeprefix("weights."): t for n, t in expected.items() if n.startswith("weights.")})
    sampled = sequential_training_step(weights, config, ids, ids)
    tokens = torch.stack(sampled.thought_tokens, dim=-1)
    given = sequential_training_step(weights, config, ids, ids, thought_tokens=tokens)

    assert tokens.shape == expected["thought_tokens"].shape
    assert not torch.isin(tokens, torch.tensor([meta["start_token_id"], meta["end_token_id"]])).any()
    assert len(tokens.unique()) > config.vocab_size // 2
    assert torch.equal(sampled.talk_nll, given.talk_nll)
    assert torch.equal(torch.stack(sampled.thought_logprobs), torch.stack(given.thought_logprobs))


def test_sequential_inference_predicts_what_the_model_predicts():
    config = QuietStarConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, thought_length=3, thought_temperature=0.0,
        start_thought_token_id=38, end_thought_token_id=39,
    )  # fmt: skip
    model = QuietStarForCausalLM(config).eval()
    torch.nn.init.normal_(model.mixing_head[-1].weight, std=0.1)
    weights, text = model_weights(model), torch.randint(38, (2, 9))
    with torch.no_grad():
        wanted = model(text, logits_to_keep=1).logits[:, 0]
    torch.testing.assert_close(sequential_next_logits(weights, config, text, greedy_thoughts=True), wanted, **VALUE)

    draws = torch.stack([sequential_next_logits(weights, config, text) for _ in range(20)])
    assert (draws.std(dim=0) > 1e-3).any()
