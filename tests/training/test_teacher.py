"""The trainer's teacher: what it is, how it follows the model, what it says; and that all goes on after a stop."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from quietstar import QuietStarTrainer
from quietstar.training.data import collate_windows


class Weights(TrainerCallback):
    """Keeps the weights behind every step, those of the beginning first."""

    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.steps.append({name: x.detach().clone() for name, x in model.named_parameters()})

    on_step_end = on_train_begin


@pytest.fixture
def make(tmp_path, windows):
    """A factory: a trainer with keyword arguments of its own; those of TrainingArguments in ``settings``."""

    def make(model, settings=None, **arguments):
        defaults = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
        settings = TrainingArguments(
            tmp_path / "run", **defaults | {"learning_rate": 1e-2} | (settings or {}), use_cpu=True, disable_tqdm=True,
            report_to="none",
        )  # fmt: skip
        data = {"train_dataset": windows, "eval_dataset": windows[:3], "data_collator": collate_windows}
        return QuietStarTrainer(model, settings, **data | arguments)

    return make


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_the_teacher_is_a_moving_average_of_the_weights(make, make_model, decay, dtype):
    weights = Weights()
    trainer = make(make_model(baseline="teacher", teacher_decay=decay).to(dtype), callbacks=[weights])
    trainer.train()
    expected = {name: x.float() for name, x in weights.steps[0].items()}
    for i, step in enumerate(weights.steps[1:], 1):
        expected = {name: decay * x + (1 - decay) * step[name].float() for name, x in expected.items()}
        if i % 2 == 0:
            saved = load_file(Path(trainer.args.output_dir) / f"checkpoint-{i}" / "teacher.safetensors")
            for name, x in expected.items():
                torch.testing.assert_close(saved[name], x, rtol=1e-6, atol=1e-7)
                assert torch.equal(trainer.model.get_parameter(name), weights.steps[-1][name])  # its own again
    assert (weights.steps[0]["lm_head.weight"] != weights.steps[-1]["lm_head.weight"]).any()


@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
def test_rewards_are_against_the_teacher(make, make_model, windows, given):
    other = make_model(lookahead=1) if given else None
    if given:
        torch.nn.init.normal_(other.lm_head.weight)
    teacher = other or make_model()
    model = make_model(baseline="teacher", teacher_decay=1.0)
    trainer, outputs = make(model, teacher=other), []
    trainer.train()
    model.register_forward_hook(lambda *call: outputs.append(call[-1]))
    before = {name: x.clone() for name, x in model.named_parameters()}
    trainer.evaluate()
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())
    batch = collate_windows(windows[:3])
    expected = teacher.base_nll(batch["input_ids"], batch["labels"])
    (output,) = outputs
    ahead = torch.stack([expected[:, m : m + output.reward.shape[2]] for m in range(3)], dim=-1)
    torch.testing.assert_close(output.reward, (ahead[:, None] - output.talk_nll[:, :, : ahead.shape[1]]).sum(dim=-1))
    assert not torch.allclose(expected, output.base_nll)


@pytest.mark.parametrize("anchors", [None, 3])
def test_the_teacher_rates_the_same_thoughts(make, make_model, windows, anchors):
    model = make_model(kl_weight=0.5, teacher_decay=1.0, anchors_per_text=anchors)
    trainer, calls = make(model), []
    trainer.train()
    model.register_forward_hook(lambda *call: calls.append(call[2:]), with_kwargs=True)
    trainer.evaluate()
    given, output = calls[-1]
    batch = collate_windows(windows[:3])
    expected = make_model()(**batch, thought_tokens=output.thought_tokens, anchors=output.anchors).thought_logprobs
    torch.testing.assert_close(given["teacher_logprobs"], expected)
    with torch.no_grad():
        again = model(**batch, thought_tokens=output.thought_tokens, anchors=output.anchors, **{
            "teacher_logprobs": expected})  # fmt: skip
    assert not torch.allclose(again.thought_logprobs, expected)


def test_without_updates_a_teacher_is_the_model_itself(make, make_model):
    """The same rewards as against the prediction of the model, to the last bit of what is logged."""
    histories = []
    for baseline in ("self", "teacher"):
        trainer = make(make_model(baseline=baseline), {"learning_rate": 0.0})
        trainer.train()
        histories.append([log["reward"] for log in trainer.state.log_history if "reward" in log])
    assert histories[0] == pytest.approx(histories[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({"baseline": "teacher", "teacher_decay": 0.9}, {}),
        ({"baseline": "teacher", "kl_weight": 0.1, "teacher_decay": 1.0, "anchors_per_text": 3}, {}),
        ({"policy_updates": 2, "clip_ratio": 0.2, "baseline": "teacher", "teacher_decay": 0.5}, {}),
        ({"baseline": "teacher"}, {"stages": "3-2:3,1-1:3"}),
        ({}, {"distil": "kl"}),
    ],
    ids=["average", "kl", "several updates", "stages", "distil"],
)
@pytest.mark.parametrize("stop", [2, 3])
def test_killed_and_resumed_gives_the_same_losses(make, make_model, fields, arguments, stop):
    settings = {"max_steps": 6, "save_steps": stop}
    whole, resumed = make_model(**fields), make_model(**fields)
    trainer = make(whole, settings, **arguments)
    trainer.train()
    expected = losses(trainer)
    trainer = make(resumed, settings, **arguments)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-{stop}")
    assert losses(trainer) == expected
    assert len(set(expected)) == 6
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_updates_go_on_in_a_later_epoch(make, make_model):
    """Of four steps: two groups of six rows, twice each."""
    settings = {"max_steps": 7, "save_steps": 5, "gradient_accumulation_steps": 3}
    expected = make(make_model(policy_updates=2, clip_ratio=0.2), settings)
    expected.train()
    torch.manual_seed(1)
    trainer = make(make_model(policy_updates=2, clip_ratio=0.2), settings)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-5")
    assert losses(trainer) == losses(expected)


def test_adapters_have_a_teacher_of_their_own_size(make, make_model):
    peft = pytest.importorskip("peft")
    from quietstar.training import lora_config

    model = make_model(baseline="teacher", teacher_decay=1.0)
    adapted = peft.get_peft_model(model, lora_config(model, r=2))
    trainer, outputs = make(adapted), []
    trainer.train()
    saved = load_file(Path(trainer.args.output_dir) / "checkpoint-4" / "teacher.safetensors")
    assert saved.keys() == {name for name, x in adapted.named_parameters() if x.requires_grad}
    model.register_forward_hook(lambda *call: outputs.append(call[2:]), with_kwargs=True)
    trainer.evaluate()
    given = trainer._compared_with(trainer.model, collate_windows(trainer.eval_dataset))["baseline_nll"]
    batch = collate_windows(trainer.eval_dataset)
    torch.testing.assert_close(given, make_model().base_nll(**batch))  # as before any adapter


@pytest.mark.parametrize(
    ("fields", "arguments", "error", "message"),
    [
        ({}, {"teacher": True}, ValueError, "teacher must be None without baseline 'teacher', a kl_weight or distil"),
        ({"baseline": "teacher"}, {"teacher": "me"}, TypeError, "teacher must be a QuietStarForCausalLM, got str"),
        ({}, {"distil": "all"}, ValueError, "distil must be None or 'kl' or 'reward', got 'all'"),
        ({}, {"distil": "kl", "stages": "2-1:4"}, ValueError, "stages must be None with distil 'kl'"),
        ({}, {"stages": "2-1:3"}, ValueError, "max_steps must be 3, the steps of stages together, .* got 4"),
    ],
)
def test_what_contradicts_itself_is_refused(make, make_model, fields, arguments, error, message):
    if arguments.get("teacher") is True:
        arguments = {"teacher": make_model()}
    with pytest.raises(error, match=message):
        make(make_model(**fields), **arguments)


def test_checkpoints_without_a_teacher_are_refused(make, make_model):
    trainer = make(make_model(baseline="teacher"))
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-2"
    (checkpoint / "teacher.safetensors").unlink()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint must hold teacher\.safetensors .*checkpoint-2"):
        make(make_model(baseline="teacher")).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("stream", [False, True])
def test_updates_are_on_the_same_thoughts(make, make_model, windows, stream):
    model = make_model(policy_updates=3, clip_ratio=0.2)
    data = Dataset.from_list(windows).to_iterable_dataset() if stream else windows
    trainer, calls = make(model, {"max_steps": 6, "gradient_accumulation_steps": 2}, train_dataset=data), []
    model.register_forward_hook(lambda *call: calls.append(call[2:]) if model.training else None, with_kwargs=True)
    trainer.train()
    assert len(calls) == 12
    for start in (0, 6):
        for first in (start, start + 1):  # the two batches of a step
            given, output = calls[first]
            assert given.get("old_logprobs") is None
            for again in (first + 2, first + 4):
                kept, _ = calls[again]
                assert torch.equal(kept["input_ids"], given["input_ids"])
                assert torch.equal(kept["thought_tokens"], output.thought_tokens)
                assert torch.equal(kept["old_logprobs"], output.thought_logprobs)
    texts = torch.cat([calls[i][0]["input_ids"] for i in (0, 1, 6, 7)])
    assert len(texts.unique(dim=0)) == 8


def test_other_batches_between_updates_are_noticed(make, make_model):
    trainer = make(make_model(policy_updates=2, clip_ratio=0.2))
    trainer._get_train_sampler = lambda dataset: range(len(dataset))
    with pytest.raises(
        RuntimeError, match="policy_updates must get the same batches 2 times, got another one in step 2"
    ):
        trainer.train()


def test_an_epoch_of_updates_has_every_row(make, make_model, windows):
    trainer = make(make_model(policy_updates=2, clip_ratio=0.2), {"max_steps": -1, "num_train_epochs": 1})
    trainer.train()
    assert trainer.state.global_step == 2 * len(windows) // 2
