"""The two trainings: first a small Mistral on the text, then Quiet-STaR on top of it."""

from collections.abc import Callable
from tempfile import gettempdir
from typing import Any, NamedTuple

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
    TrainerState,
    TrainingArguments,
)

from quietstar.models import QuietStarForCausalLM
from quietstar.training import QuietStarTrainer
from quietstar.training.data import collate_windows

LOGS = 30  # number of logs in a training


class Training(NamedTuple):
    """The length, batch size and learning rate of a training."""

    steps: int
    batch_size: int  # windows per step
    learning_rate: float


class Trained(NamedTuple):
    """Results of a training besides the model."""

    tokens_per_second: float  # tokens of text
    state: TrainerState  # with the logs


# One thought per position, which predicts only the next token: the paper's 9 tokens, 2 thoughts and lookahead of 4 cost
# about twenty times as much. The paper's policy weight belongs to its learning rate of 1e-6.
THINKING = {"lookahead": 1, "num_thoughts": 1, "policy_weight": 0.1, "embedding_scale": 1.0}


def second_seed(seed: int) -> int:
    """Return the seed of the second training, which differs so that it does not repeat the draws of the first."""
    return (seed + 1) % 2**32  # NumPy's range of seeds


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


def new_base(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, intermediate_size: int, layers: int, kv_heads: int
) -> MistralForCausalLM:
    """Create an ordinary Mistral with four heads and random weights."""
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return MistralForCausalLM(config)


def train_base(
    model: MistralForCausalLM, windows: np.ndarray, training: Training, seed: int,
    title: str = "base model",
) -> None:  # fmt: skip
    """Train a model on windows [windows, L] without thoughts, in place."""
    _run(Trainer, model, ProgressBar(f"     {title}", {"loss": "nll"}), windows, training, seed)


def train_thinking(
    model: QuietStarForCausalLM, windows: np.ndarray, training: Training, seed: int,
    title: str = "Quiet-STaR", collator: Callable = collate_windows, **options: Any,
) -> Trained:  # fmt: skip
    """Train a base model with Quiet-STaR, in place; ``options`` are further options of the trainer."""
    shown = {"base_nll": "without", "talk_nll_0": "after a thought", "mixing_weight": "weight"}
    bar = ProgressBar(f"     {title}", shown)
    trainer = _run(QuietStarTrainer, model, bar, windows, training, seed, collator, **options)
    tokens = training.steps * training.batch_size * windows.shape[1]
    return Trained(tokens / trainer.state.log_history[-1]["train_runtime"], trainer.state)


def _run(
    trainer_class: type[Trainer],
    model: PreTrainedModel,
    bar: ProgressBar,
    windows: np.ndarray,
    training: Training,
    seed: int,
    collator: Callable = collate_windows,
    **options: Any,
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=gettempdir(),  # nothing is saved
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        adam_beta2=0.99,
        weight_decay=0.01,
        logging_steps=max(1, training.steps // LOGS),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    dataset = Dataset.from_dict({"input_ids": windows})
    trainer = trainer_class(model, arguments, train_dataset=dataset, data_collator=collator, **options)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(bar)
    trainer.train()
    return trainer
