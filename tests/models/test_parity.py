"""The model against numbers of the authors' code (tests/fixtures/parity/README.md says what the files hold)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.models.checkpoint import authors_state_dict

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"
FILES = sorted(Path(os.environ.get("QUIETSTAR_PARITY_DIR", FIXTURES)).glob("*.safetensors"))


@pytest.fixture(params=["reference", "torch", pytest.param("triton", marks=pytest.mark.slow)])
def device(request, monkeypatch):
    """Where every op runs by one backend: on the CPU, Triton's kernels in its interpreter if there is no GPU."""
    monkeypatch.setenv("QUIETSTAR_BACKEND", request.param)
    if request.param != "triton":
        return "cpu"
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(file, device):
    """Model, tensors and settings of a parity file."""
    with safe_open(file, "pt", device) as archive:
        meta = json.loads(archive.metadata()["meta"])
        tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    config = QuietStarConfig(
        **meta["config"],
        start_thought_token_id=meta["start_token_id"],
        end_thought_token_id=meta["end_token_id"],
        thought_length=meta["n_ahead"] - 3,
        lookahead=meta["n_ahead_talk"],
        num_thoughts=meta["n_passes"],
        policy_weight=meta["policy_loss_beta"],
        policy_temperature=meta["reinforce_temperature"],
        base_loss_weight=meta["original_loss_weight"],
        embedding_scale=meta["embedding_scale"],
    )
    model = QuietStarForCausalLM(config).to(device)
    model.load_state_dict(authors_state_dict(part(tensors, "weights.")))
    return model, tensors, meta


def part(tensors, prefix):
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def files(mode):
    chosen = [file for file in FILES if mode in file.stem]
    return pytest.mark.parametrize("file", chosen, ids=lambda file: file.stem)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-6)


def test_there_are_parity_files_of_both_modes():
    assert {"train" in file.stem for file in FILES} == {True, False}


@files("train")
def test_training_parity(file, device):
    model, expected, _ = load(file, device)
    input_ids, mask = expected["input_ids"], expected["attention_mask"]
    output = model(
        input_ids,
        attention_mask=mask,
        labels=input_ids.masked_fill(input_ids == 0, -100),
        thought_tokens=expected["thought_tokens"],
    )
    output.loss.backward()

    num_thoughts, length = model.config.num_thoughts, input_ids.shape[1]
    assert_close(output.base_nll.repeat_interleave(num_thoughts, dim=0), expected["loss.base"])
    for m in range(model.config.lookahead):
        assert_close(output.talk_nll[:, :, : length - 1 - m, m].flatten(0, 1), expected[f"loss.talk.{m}"])
    assert_close(output.reward.flatten(0, 1), expected["reward"])
    real = mask[:, :-1].repeat_interleave(num_thoughts, dim=0).bool()
    for j in range(model.config.thought_length):
        assert_close(output.thought_logprobs[..., j].flatten(0, 1)[real], expected[f"thought_logprob.{j}"][real])
    torch.testing.assert_close(output.policy_loss[None], expected["policy_loss"], atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(output.loss.detach()[None], expected["loss"], atol=2e-5, rtol=5e-6)

    wanted = authors_state_dict(part(expected, "grad."))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        error = (gradient - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-30)
        assert error < 1e-5, f"gradient of {name}: relative error {error:.1e}"


@files("eval")
def test_evaluation_parity(file, device):
    model, expected, _ = load(file, device)
    model.eval()
    input_ids, mask = expected["input_ids"], expected["attention_mask"]
    with torch.no_grad():
        predicted = model(input_ids, attention_mask=mask, thought_tokens=expected["thought_tokens"])
        scored = model(
            input_ids,
            attention_mask=mask,
            labels=input_ids.masked_fill(input_ids == 0, -100),
            thought_tokens=expected["thought_tokens"],
        )
    real = mask.bool()
    assert_close(predicted.logits[real], expected["mixed_logits"][real])
    assert_close(scored.base_nll, expected["loss.base"])
    assert_close(scored.talk_nll[:, 0, :, 0], expected["loss.talk.0"])
