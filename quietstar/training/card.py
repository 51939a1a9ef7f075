"""Facts about a training run for the model card."""

from transformers import Trainer
from transformers.trainer_utils import SchedulerType

# Values of the last evaluation: name in the logs -> name in the card.
_EVALUATED = {
    "eval_base_nll": "held-out text without thoughts, nats per token",
    "eval_talk_nll_0": "held-out text after a thought, nats per token",
    "eval_gain_hard": "gain of a thought on the hardest tenth of the tokens, nats",
    "eval_gain_easy": "gain of a thought on the easiest tenth of the tokens, nats",
}


def training_table(trainer: Trainer) -> dict[str, object]:
    """Return rows of a table, name -> value: data, steps and evaluation, as far as known at this step."""
    args, state = trainer.args, trainer.state
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    table: dict[str, object] = {}
    if source := getattr(trainer, "data_source", None):
        table["data"] = ", ".join(f"`{name}`" for name in ([source] if isinstance(source, str) else source))
    if hasattr(trainer.train_dataset, "__len__"):
        table["windows of text"] = len(trainer.train_dataset)
    table["steps"] = state.global_step
    table["windows per step"] = batch
    table["learning rate"] = f"{args.learning_rate:g}, {SchedulerType(args.lr_scheduler_type).value}"
    table["seed"] = args.seed
    evaluated = next((logs for logs in reversed(state.log_history) if "eval_base_nll" in logs), {})
    for name, text in _EVALUATED.items():
        if name in evaluated:
            table[text] = f"{evaluated[name]:.4f} (after step {evaluated['step']})"
    return table
