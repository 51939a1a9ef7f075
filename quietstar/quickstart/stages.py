"""The two trainings: a small Mistral on the text, then Quiet-STaR on top of it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from tqdm import tqdm
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from quietstar.models import QuietStarForCausalLM
from quietstar.training import QuietStarTrainer
from quietstar.training.data import collate_windows


class Size(NamedTuple):
    """How large the model and how long its trainings are."""

    files: int | None  # of the standard library; None is all of them
    vocabulary: int
    hidden_size: int
    layers: int
    length: int  # tokens per window
    base_steps: int
    thinking_steps: int
    held_out_windows: int


# About four minutes on two cores, and a few seconds for the tests.
USUAL = Size(
    files=None, vocabulary=2048, hidden_size=128, layers=3, length=128, base_steps=800, thinking_steps=250,
    held_out_windows=160,
)  # fmt: skip
TINY = Size(
    files=40, vocabulary=512, hidden_size=32, layers=1, length=64, base_steps=8, thinking_steps=4, held_out_windows=8
)

# Short thoughts, one each, predicting the next token only: the paper's 9 tokens, 2 thoughts and 4 tokens ahead cost
# about twenty times as much. The policy weight of the paper belongs to its learning rate of 1e-6.
THINKING = {
    "thought_length": 1,
    "lookahead": 1,
    "num_thoughts": 1,
    "policy_weight": 0.1,
    "embedding_scale": 1.0,
}


class ProgressBar(TrainerCallback):
    """A progress bar that shows chosen values of the last log."""

    def __init__(self, title: str, shown: dict[str, str]):
        self.title, self.shown = title, shown

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=self.title, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs, **kwargs):
        values = {label: f"{logs[name]:.3f}" for name, label in self.shown.items() if name in logs}
        if values:
            self.bar.set_postfix(values)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def train_base(
    windows: np.ndarray, tokenizer: PreTrainedTokenizerFast, size: Size, folder: Path, seed: int
) -> MistralForCausalLM:
    """An ordinary Mistral, trained from random weights."""
    config = MistralConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden_size,
        intermediate_size=3 * size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = MistralForCausalLM(config)
    bar = ProgressBar("     base model", {"loss": "nll"})
    _run(Trainer, model, bar, windows, folder, seed, size.base_steps, batch_size=16, learning_rate=3e-3)
    return model


def train_thinking(model: QuietStarForCausalLM, windows: np.ndarray, size: Size, folder: Path, seed: int) -> float:
    """Quiet-STaR on top of a base model, in place. Returns tokens of text per second."""
    bar = ProgressBar(
        "     Quiet-STaR", {"base_nll": "without", "talk_nll_0": "after a thought", "mixing_weight": "weight"}
    )
    trainer = _run(
        QuietStarTrainer, model, bar, windows, folder, seed + 1, size.thinking_steps, batch_size=8, learning_rate=2e-3
    )
    return size.thinking_steps * 8 * size.length / trainer.state.log_history[-1]["train_runtime"]


def _run(
    trainer_class: type[Trainer],
    model: PreTrainedModel,
    bar: ProgressBar,
    windows: np.ndarray,
    folder: Path,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        adam_beta2=0.99,
        weight_decay=0.01,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    trainer = trainer_class(
        model, arguments, train_dataset=Dataset.from_dict({"input_ids": windows}), data_collator=collate_windows
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(bar)
    trainer.train()
    return trainer
