"""Gains on the hardest and the easiest tenth of held-out tokens, as they were before training."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, default_data_collator

from quietstar.training.difficulty import FILE_NAME, GainByDifficulty


class Outputs(TrainerCallback):
    """Keeps what the model says of held-out text, by the step."""

    def __init__(self, model):
        self.by_step, self.step = {}, 0
        model.register_forward_hook(self.keep)

    def keep(self, model, _, output):
        if not model.training and output.talk_nll.shape[3] > 1:  # not to choose the tokens
            self.by_step.setdefault(self.step, []).append(output)

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step


@torch.no_grad()
def base_nll(model, rows):
    """Nll [tokens] of the prediction without a thought."""
    text = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows])
    logits = model.lm_head(model.eval().model(text[:, :-1]).last_hidden_state)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="none")


def expected_gains(before, outputs):
    """Of the hardest and the easiest three of 27 tokens."""
    gain = torch.cat([(output.base_nll - output.talk_nll[..., 0].mean(dim=1)).flatten() for output in outputs])
    order = before.argsort()
    return {"eval_gain_hard": float(gain[order[-3:]].mean()), "eval_gain_easy": float(gain[order[:3]].mean())}


def logged(trainer, step):
    (log,) = (log for log in trainer.state.log_history if log["step"] == step and "eval_gain_hard" in log)
    return {name: log[name] for name in ("eval_gain_hard", "eval_gain_easy")}


EVERY_STEP = {
    "max_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "per_device_eval_batch_size": 2,
}


def test_tokens_are_chosen_before_training_and_kept(make_model, make_trainer, windows):
    model = make_model()
    before, outputs = base_nll(model, windows[:3]), Outputs(model)
    trainer = make_trainer(model, [outputs], **EVERY_STEP, eval_on_start=True)
    trainer.train()
    for step in (0, 2, 4):
        assert logged(trainer, step) == pytest.approx(expected_gains(before, outputs.by_step[step]), rel=1e-4)
    chosen_later = expected_gains(base_nll(model, windows[:3]), outputs.by_step[4])
    assert logged(trainer, 4) != pytest.approx(chosen_later, rel=1e-2)


def test_resumed_training_keeps_them(make_model, make_trainer):
    whole, resumed = (make_trainer(make_model(), **EVERY_STEP) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert logged(resumed, 4) == logged(whole, 4)
    (chosen,) = load_file(f"{whole.args.output_dir}/checkpoint-4/{FILE_NAME}").values()
    assert sorted(chosen.tolist()) == [-1] * 3 + [0] * 21 + [1] * 3


def test_choosing_leaves_training_and_configuration_alone(make_model, make_trainer):
    models = [make_model(), make_model()]
    for model, has_text in zip(models, (True, False), strict=True):
        trainer = make_trainer(model, max_steps=2)
        if not has_text:
            trainer.eval_dataset = None
        trainer.train()
        config = model.config
        assert (config.thought_length, config.num_thoughts, config.lookahead) == (2, 2, 3)
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)


def test_several_texts(make_model, make_trainer, windows):
    """Each has its own tokens, and so has one that was not there before training."""
    model = make_model()
    texts = {"a": windows[:3], "b": windows[3:6]}
    before, outputs = {name: base_nll(model, rows) for name, rows in texts.items()}, Outputs(model)
    trainer = make_trainer(model, [outputs], max_steps=2)
    trainer.eval_dataset = texts
    trainer.train()
    metrics = trainer.evaluate()
    both = outputs.by_step.pop(2)
    for name, part in (("a", both[:1]), ("b", both[1:])):
        for key, value in expected_gains(before[name], part).items():
            assert metrics[key.replace("eval_", f"eval_{name}_")] == pytest.approx(value, rel=1e-4)
    trainer.eval_dataset = None
    later = trainer.evaluate(windows[6:9])
    wanted = expected_gains(base_nll(model, windows[6:9]), outputs.by_step[2])
    assert {name: later[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


def test_only_tokens_with_a_label_count():
    gains, nll, labels = GainByDifficulty(), torch.rand(2, 15), torch.randint(0, 9, (2, 15))
    labels[0, 5:] = -100
    nll[0, 5:] = 1000.0
    gains.add(nll, nll * 2, labels)
    gains.rate()
    gains.add(-nll, nll * 2, labels)  # the other way round, which no longer matters
    kept = torch.cat([nll[0, :5], nll[1]]).sort().values * 2
    assert gains.means() == pytest.approx({"gain_hard": float(kept[-2:].mean()), "gain_easy": float(kept[:2].mean())})
    assert gains.means() == {}
    gains.add(nll, nll, torch.full_like(labels, -100))
    assert gains.means() == {}


def test_held_out_text_without_labels_does_not_keep_from_training(make_model, make_trainer, windows):
    trainer = make_trainer(make_model(), max_steps=1)
    trainer.train_dataset = [row | {"labels": row["input_ids"]} for row in windows]
    trainer.data_collator = default_data_collator
    trainer.train()
    assert trainer.state.global_step == 1
