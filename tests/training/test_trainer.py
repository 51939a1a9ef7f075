"""The trainer: gradients, logs, checkpoints, and what it does when numbers go bad."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback, TrainingArguments, default_data_collator

from quietstar import QuietStarForCausalLM
from quietstar.training import NonFiniteError


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})


class At(TrainerCallback):
    """Does something to the model before the given step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step + 1 == self.step:
            self.action(model)


def poison_weights(model):
    model.lm_head.weight.data.fill_(torch.nan)


def poison_gradients(model):
    model.lm_head.weight.register_hook(lambda gradient: gradient * torch.nan)


def checkpoints(trainer):
    return sorted(folder.name for folder in Path(trainer.args.output_dir).glob("checkpoint-*"))


def test_accumulated_micro_batches_give_the_gradient_of_the_batch(make_model, make_trainer):
    batch, accumulated = Gradients(), Gradients()
    # Greedy thoughts are the same in any batch; with one per position their policy term does not vanish.
    for size, gradients in ((2, batch), (1, accumulated)):
        model = make_model(thought_temperature=0, num_thoughts=1)
        make_trainer(
            model, [gradients], max_steps=1, max_grad_norm=0, per_device_train_batch_size=size,
            gradient_accumulation_steps=2 // size,
        ).train()  # fmt: skip
    (expected,), (actual,) = batch.steps, accumulated.steps
    for name, gradient in actual.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_a_gain_head_is_trained_and_its_error_logged(make_model, make_trainer):
    model, errors = make_model(gain_weight=1.0), {True: [], False: []}
    trainer = make_trainer(model, max_steps=6, logging_steps=2, per_device_eval_batch_size=2)
    model.register_forward_hook(lambda *call: errors[model.training].append(call[-1].gain_loss))
    trainer.train()
    trainer.evaluate()
    *logs, _, evaluated = trainer.state.log_history
    expected = torch.stack(errors[True]).view(3, 2).mean(dim=1)
    assert [log["gain_loss"] for log in logs] == pytest.approx(expected.tolist(), rel=1e-5)
    *_, first, second = errors[False]
    assert evaluated["eval_gain_loss"] == pytest.approx(float(2 * first + second) / 3, rel=1e-5)  # of three windows
    assert model.gain_head[-1].bias.any()


def test_logs_are_means_over_the_steps_since_the_last_log(make_model, make_trainer):
    model, outputs = make_model(), []
    trainer = make_trainer(model, max_steps=4, logging_steps=2, gradient_accumulation_steps=2)
    model.register_forward_hook(lambda *call: outputs.append(call[-1]) if model.training else None)
    trainer.train()
    trainer.evaluate()
    first, second, *_ = trainer.state.log_history
    assert len(outputs) == 8
    for log, passes in ((first, outputs[:4]), (second, outputs[4:])):
        expected = {
            "base_nll": torch.stack([output.base_nll for output in passes]).mean(),
            "reward": torch.stack([output.reward for output in passes]).mean(),
            "policy_loss": torch.stack([output.policy_loss for output in passes]).mean(),
            "advantage_mean": torch.stack([output.advantage for output in passes]).mean(),
            "advantage_std": torch.stack([output.advantage for output in passes]).std(correction=0),
            "thought_entropy": torch.stack([output.thought_entropy for output in passes]).mean(),
        }
        thoughts = [output.thought_tokens[:, :, :-1].flatten(0, 2) for output in passes]
        different = sum(len(x.unique(dim=0)) for x in thoughts)
        expected["distinct_thoughts"] = different / sum(map(len, thoughts))
        for m in range(3):  # the last m positions have no token so far ahead
            talk = torch.stack([output.talk_nll[:, :, :, m] for output in passes])
            expected[f"talk_nll_{m}"] = talk[..., : talk.shape[-1] - m].mean()
        for name, value in expected.items():
            assert log[name] == pytest.approx(float(value), rel=1e-5), name
        assert log["tokens_per_second"] > 0
        assert "mixing_weight" in log


def test_resumed_training_gives_the_same_weights(make_model, make_trainer):
    # Eight steps pass the end of an epoch of six; the checkpoint lies within the first.
    arguments = {"max_steps": 8, "save_steps": 4, "warmup_steps": 2}
    whole, resumed = make_model(), make_model()
    make_trainer(whole, **arguments).train()
    trainer = make_trainer(resumed, **arguments)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-4")
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name
    assert not torch.equal(whole.lm_head.weight, make_model().lm_head.weight)


def test_evaluation_is_repeatable_and_leaves_training_alone(make_model, make_trainer):
    trainer = make_trainer(make_model())
    state = torch.get_rng_state()
    metrics = trainer.evaluate()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    again = trainer.evaluate()
    names = {
        "eval_base_nll",
        "eval_reward",
        "eval_mixing_weight",
        "eval_policy_loss",
        "eval_gain_hard",
        "eval_gain_easy",
    }
    names |= {f"eval_talk_nll_{m}" for m in range(3)}
    assert names <= metrics.keys()
    assert {name: metrics[name] for name in names} == {name: again[name] for name in names}


def test_tensorboard_shows_what_is_logged(make_model, make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    make_trainer(make_model(), max_steps=2, logging_steps=1, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert {"train/base_nll", "train/talk_nll_2", "train/tokens_per_second"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/base_nll")) == 2


@pytest.mark.parametrize(
    ("check_every_step", "poison", "step", "message"),
    [
        (True, poison_weights, 3, "the loss of step 3 is not finite; the last checkpoint is .*checkpoint-2"),
        (False, poison_weights, 3, "the loss of step 3 is not finite; the last checkpoint is .*checkpoint-2"),
        (True, poison_gradients, 4, "weight is not finite after step 4; the last .*checkpoint-2"),
        (True, poison_weights, 1, "the loss of step 1 is not finite; no checkpoint yet"),
    ],
    ids=["each-step", "before-saving", "weights", "first-step"],
)
def test_bad_numbers_stop_training_and_are_never_saved(
    make_model, make_trainer, check_every_step, poison, step, message
):
    trainer = make_trainer(make_model(), [At(step, poison)], max_steps=6, save_steps=2, logging_strategy="no")
    trainer._check_every_step = check_every_step
    with pytest.raises(NonFiniteError, match=message):
        trainer.train()
    assert trainer.state.global_step == (step - 1 if check_every_step and poison is poison_weights else 4)
    assert checkpoints(trainer) == ["checkpoint-2"][: step > 2]
    for checkpoint in checkpoints(trainer):
        model = QuietStarForCausalLM.from_pretrained(Path(trainer.args.output_dir) / checkpoint)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_bad_loss_shows_at_the_next_log(make_model, make_trainer):
    trainer = make_trainer(make_model(), [At(2, poison_weights)], max_steps=6, logging_steps=3, save_strategy="no")
    trainer._check_every_step = False
    with pytest.raises(NonFiniteError, match="the loss of step 2 is not finite"):
        trainer.train()
    assert trainer.state.global_step == 3


def test_the_last_checkpoint_is_the_last_whole_one(make_model, make_trainer, tmp_path):
    def break_the_newest_and_poison(model):
        (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
        poison_weights(model)

    trainer = make_trainer(make_model(), [At(5, break_the_newest_and_poison)], max_steps=6, save_steps=2)
    with pytest.raises(NonFiniteError, match=r"step 5 is not finite; the last checkpoint is .*checkpoint-2$"):
        trainer.train()


@pytest.mark.parametrize("extra", ["position_ids", "attention_mask", "row"])
def test_other_columns_change_nothing(make_model, make_trainer, windows, extra):
    columns = {
        "position_ids": torch.arange(len(windows[0]["input_ids"])),
        "attention_mask": torch.ones(len(windows[0]["input_ids"]), dtype=torch.int64),
        "row": torch.zeros(()),
    }
    rows = [row | {"labels": row["input_ids"]} for row in windows]
    histories = []
    for data in (rows, [row | {extra: columns[extra]} for row in rows]):
        trainer = make_trainer(make_model(), max_steps=2, logging_steps=1)
        trainer.train_dataset, trainer.data_collator = data, default_data_collator
        trainer.train()
        histories.append([log["base_nll"] for log in trainer.state.log_history if "base_nll" in log])
    assert len(histories[0]) == 2
    assert histories[0] == histories[1]


def test_streamed_data(make_model, make_trainer, windows):
    trainer = make_trainer(make_model(), max_steps=3)
    trainer.train_dataset = Dataset.from_list(windows).to_iterable_dataset()
    trainer.train()
    assert trainer.state.global_step == 3


def test_batches_without_labels_are_refused(make_model, make_trainer):
    trainer = make_trainer(make_model(), max_steps=1)
    trainer.data_collator = default_data_collator
    with pytest.raises(ValueError, match="labels must be in every batch, got input_ids"):
        trainer.train()


@pytest.mark.parametrize(
    ("policy_weight", "rate", "thought_length", "warns"),
    [
        (1e6, 1e-6, 2, False),
        (1e6, 1e-5, 2, False),
        (1e6, 2e-5, 2, True),
        (1e6, 2e-3, 2, True),
        (1.0, 2e-3, 2, False),
        (0.0, 1.0, 2, False),
        (1e6, 2e-3, 0, False),  # no policy term
    ],
)
@pytest.mark.parametrize("own_optimizer", [False, True], ids=["", "own optimizer"])
def test_warns_of_policy_weights_for_other_learning_rates(
    make_model, make_trainer, monkeypatch, policy_weight, rate, thought_length, warns, own_optimizer
):
    warnings = []
    monkeypatch.setattr("quietstar.training.checks.logger.warning", warnings.append)
    model = make_model(policy_weight=policy_weight, thought_length=thought_length)
    trainer = make_trainer(model, max_steps=2, learning_rate=1.0 if own_optimizer else rate, logging_strategy="no")
    if own_optimizer:
        trainer.optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    trainer.train()
    assert len(warnings) == warns
    if warns:
        assert f"policy_weight 1e+06 is too much for learning_rate {rate:g}" in warnings[0]
        assert f"set policy_weight to {1 / rate:g} or less, or learning_rate to 1e-06 or less" in warnings[0]


def test_several_gpus_in_one_process_are_refused(make_model, make_trainer, monkeypatch):
    """Stands in for a machine with GPUs and a start without torchrun, where the Trainer takes DataParallel."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(
        ValueError, match=r"got 2 GPUs in one: start with `torchrun --nproc_per_node 2 .* CUDA_VISIBLE_DEVICES=0"
    ):
        make_trainer(make_model())
