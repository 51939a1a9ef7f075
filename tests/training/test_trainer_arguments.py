"""QuietStarTrainer takes what Trainer takes, or says no when it is made."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from quietstar import QuietStarTrainer
from quietstar.training.data import collate_windows

VOCABULARY, LENGTH = 40, 10


@pytest.fixture
def make(make_model, tmp_path, windows):
    """A factory: a trainer with any arguments of Trainer; those of TrainingArguments in ``settings``."""

    def make(settings=None, **arguments):
        defaults = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
        settings = TrainingArguments(tmp_path / "run", **defaults | (settings or {}), use_cpu=True, disable_tqdm=True)
        data = {"train_dataset": windows, "eval_dataset": windows[:3], "data_collator": collate_windows}
        model = {} if "model_init" in arguments else {"model": make_model()}
        return QuietStarTrainer(**model | {"args": settings} | data | arguments)

    return make


def trained(trainer):
    """The trainer, which sets the seed when it is made, after its training."""
    trainer.train()
    return trainer


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def accuracy(prediction):
    assert prediction.predictions.shape == (3, LENGTH, VOCABULARY)
    assert prediction.label_ids.shape == (3, LENGTH)
    return {"accuracy": (prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean()}


def likeliest(logits, labels):
    assert logits.shape[:2] == labels.shape
    return logits.argmax(dim=-1)


def test_metrics_of_ones_own(make, windows):
    trainer = make(compute_metrics=accuracy)
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert metrics["eval_base_nll"] > 0
    plain = make().evaluate()
    assert metrics["eval_loss"] == plain["eval_loss"]  # the same thoughts are drawn

    passes = []
    trainer.model.register_forward_hook(lambda *call: passes.append(call[-1]))
    output = trainer.predict(windows[:3])
    scored, predicted = passes
    assert torch.equal(predicted.thought_tokens, scored.thought_tokens[:, :1])
    assert np.array_equal(output.predictions, predicted.logits)
    assert np.array_equal(output.label_ids, collate_windows(windows[:3])["labels"])

    def matches(prediction):
        assert np.array_equal(prediction.predictions, output.predictions.argmax(axis=-1))
        return {"seen": 1}

    trainer = make(compute_metrics=matches, preprocess_logits_for_metrics=likeliest)
    assert trainer.evaluate()["eval_seen"] == 1


def test_predictions_without_labels(make, windows):
    trainer = make(data_collator=lambda rows: {"input_ids": collate_windows(rows)["input_ids"]})
    output = trainer.predict(windows[:3])
    assert output.predictions.shape == (3, LENGTH, VOCABULARY)
    assert np.isfinite(output.predictions).all()
    assert output.label_ids is None
    with pytest.raises(ValueError, match="labels must be in every batch, got input_ids"):
        trainer.evaluate()


def test_a_function_that_makes_the_model(make, make_model):
    trainer = make(model_init=lambda: make_model())
    first = losses(trained(trainer))
    assert losses(trained(trainer)) == first  # of a model that was made anew


def test_an_optimizer_of_ones_own(make, make_model):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1)
    before = model.lm_head.weight.detach().clone()
    make(model=model, optimizers=(optimizer, schedule)).train()
    assert torch.equal(model.lm_head.weight, before)
    trainer = make(optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5, "momentum": 0.5}))
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert not torch.equal(trainer.model.lm_head.weight, before)


@pytest.mark.parametrize(
    "settings",
    [
        {"neftune_noise_alpha": 5.0},
        {"gradient_checkpointing": True},
        {"eval_on_start": True},
        {"optim": "adafactor"},
        {"bf16": True},
        {"bf16_full_eval": True, "eval_strategy": "steps", "eval_steps": 1},
        {"train_sampling_strategy": "group_by_length"},
        {"auto_find_batch_size": True},
        {"include_num_input_tokens_seen": "all"},
        {"dataloader_num_workers": 1},
        {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True,
         "metric_for_best_model": "eval_talk_nll_0"},
        {"torch_empty_cache_steps": 1},
        {"use_cache": True},
        {"gradient_accumulation_steps": 2, "average_tokens_across_devices": True},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_settings_that_work(make, settings):
    trainer = trained(make(settings))
    assert all(np.isfinite(losses(trainer)))
    assert len(losses(trainer)) == 2
    assert np.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("fields", [{"anchors_per_text": 3}, {"learned_thought_end": True}], ids=str)
def test_metrics_of_ones_own_think_everywhere(make, make_model, fields):
    trainer = make(compute_metrics=accuracy, model=make_model(**fields))
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1


def test_noise_in_the_embeddings_is_there_in_training_alone(make):
    plain, noisy = ({"neftune_noise_alpha": alpha} for alpha in (None, 50.0))
    assert make(plain).evaluate()["eval_base_nll"] == make(noisy).evaluate()["eval_base_nll"]
    assert losses(trained(make(plain))) == losses(trained(make(plain)))
    assert abs(losses(trained(make(plain)))[0] - losses(trained(make(noisy)))[0]) > 1e-3


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_losses(make, make_model):
    for length in 2, 3:  # the second is symbolic
        compiled = trained(make({"torch_compile_backend": "aot_eager"}, model=make_model(thought_length=length)))
        plain = trained(make(model=make_model(thought_length=length)))
        assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def padding_collator():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})), pad_token="a")
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


@pytest.mark.parametrize("collator", [padding_collator, DataCollatorWithFlattening], ids=["padding", "flattening"])
def test_collators_of_transformers(make, collator):
    rows = [{"input_ids": torch.randint(1, 38, (length,)).tolist()} for length in (6, 10, 8, 7)]
    trainer = make(train_dataset=rows, eval_dataset=rows, data_collator=collator())
    trainer.train()
    assert all(np.isfinite(losses(trainer)))


@pytest.mark.parametrize(
    ("settings", "arguments", "error", "message"),
    [
        ({}, {"compute_loss_func": lambda *_: 0}, ValueError, "compute_loss_func must be None: the loss is "),
        ({"label_smoothing_factor": 0.1}, {}, ValueError, r"label_smoothing_factor must be 0, got 0\.1"),
        ({"use_liger_kernel": True}, {}, ValueError, "use_liger_kernel must be False, got True: its forward pass"),
        ({}, {"model": torch.nn.Linear(2, 2)}, TypeError, "model must be a QuietStarForCausalLM, .*, got Linear"),
        ({}, {"more": 1}, TypeError, "unexpected keyword argument 'more'"),
    ],
    ids=["loss function", "label smoothing", "Liger", "other model", "unknown"],
)  # fmt: skip
def test_arguments_that_go_around_the_objective_are_refused(make, settings, arguments, error, message):
    with pytest.raises(error, match=message):
        make(settings, **arguments)


def test_an_ordinary_model_is_refused(make):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    with pytest.raises(TypeError, match="model must be a QuietStarForCausalLM, adapted or not, got MistralForCausalLM"):
        make(model=model)
