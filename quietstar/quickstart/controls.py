"""Controls for the gain: other kinds of thoughts, other trainings, and other thought lengths."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import MistralForCausalLM, PreTrainedTokenizerFast, set_seed

from quietstar.models import QuietStarForCausalLM
from quietstar.quickstart.measures import Answers, Exam, answer, answer_at_once
from quietstar.quickstart.stages import Training, train_base, train_thinking
from quietstar.quickstart.world import Windows, World
from quietstar.training.data import collate_windows

FILLER = "."
LENGTHS = range(4)
OTHER_LENGTH = "trained with thoughts of length {}"

Row = dict[str, str | float]


class Stage(NamedTuple):
    """The settings of the second training, to run variants of it."""

    folder: Path  # folder with the base model
    tokenizer: PreTrainedTokenizerFast
    world: World
    exam: Exam
    text: Windows
    training: Training
    seed: int
    thinking: dict[str, float]  # fields of the configuration

    def train(self, title: str, filler: int | None = None, **changes: float) -> QuietStarForCausalLM:
        """Train a model like the first one except for some fields, or on thoughts that consist of one filler token."""
        set_seed(self.seed)
        model = QuietStarForCausalLM.from_base(self.folder / "base", self.tokenizer, **self.thinking | changes)

        def collate(windows: list) -> dict[str, Tensor]:
            batch = collate_windows(windows)
            shape = len(windows), model.config.num_thoughts, batch["input_ids"].shape[1], model.config.thought_length
            return batch | {"thought_tokens": torch.full(shape, filler)}

        collator = collate_windows if filler is None else collate
        train_thinking(model, self.text.tokens, self.training, self.seed, title, collator)
        return model

    def train_without_thoughts(self) -> MistralForCausalLM:
        """Train the base model for as many steps without thoughts."""
        set_seed(self.seed)
        model = MistralForCausalLM.from_pretrained(self.folder / "base")
        train_base(model, self.text.tokens, self.training, self.seed, "ordinary training")
        return model


def further_controls(model: QuietStarForCausalLM, stage: Stage, own: Answers, seconds: float) -> list[Row]:
    """Measure the trained model with other thoughts, and other trainings on the same text, as rows of a table.

    Args:
        model: the trained model.
        stage: the settings of its training.
        own: the model's answers after its own thoughts.
        seconds: duration of its training, to announce how long this will take.
    """
    lengths = [length for length in LENGTHS if length != stage.thinking["thought_length"]]
    count = len(lengths) + 3
    print(f"\n     {count} more trainings, about {math.ceil(count * seconds / 60)} min")
    names = torch.tensor(stage.tokenizer.convert_tokens_to_ids(stage.world.people))
    filler = stage.tokenizer.convert_tokens_to_ids(FILLER)
    random_names = names[torch.randint(len(names), own.thoughts.shape)]
    results = {"after random people": answer(model, stage.exam, random_names)}
    for length in lengths:
        other = stage.train(f"thought length {length}", thought_length=length)
        results[OTHER_LENGTH.format(length)] = answer(other, stage.exam)
    other = stage.train("filler tokens", filler=filler)
    results["trained with filler tokens for thoughts"] = answer(
        other, stage.exam, torch.full_like(own.thoughts, filler)
    )
    other = stage.train("policy weight 0", policy_weight=0.0)
    results["trained with policy weight 0"] = answer(other, stage.exam)
    results["ordinary training on the same text"] = answer_at_once(stage.train_without_thoughts(), stage.exam)
    return [{"name": name} | answers.means() for name, answers in results.items()]
