"""Fast Quiet-STaR's curriculum (arXiv 2505.17746): stages of training in which thoughts become shorter."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import TrainerCallback

from quietstar._numbers import Interval
from quietstar.models import QuietStarConfig

_INTERVALS = {
    "thought_length": Interval(int, "[0, inf)"),
    "lookahead": Interval(int, "[1, inf)"),
    "steps": Interval(int, "[1, inf)"),
}


class Stage(NamedTuple):
    """A stage of training: thought length, lookahead and number of optimizer steps."""

    thought_length: int
    lookahead: int
    steps: int

    def __str__(self) -> str:
        return f"{self.thought_length}-{self.lookahead}:{self.steps}"


def parse_stages(stages: str | Sequence[Stage | tuple[int, int, int]]) -> list[Stage]:
    """Parse stages such as ``"16-8:50,12-4:50,8-4:50"``: thought length, lookahead and steps of each.

    Raises:
        TypeError, ValueError: the text has another form, or a number is out of range.
    """
    if isinstance(stages, str):
        found = [re.fullmatch(r"(\d+)-(\d+):(\d+)", part.strip()) for part in stages.split(",")]
        if not all(found):
            raise ValueError(f"stages must be like 16-8:50,12-4:50 (thought length-lookahead:steps), got {stages!r}")
        parsed = [Stage(*map(int, match.groups())) for match in found]
    else:
        parsed = [Stage(*stage) for stage in stages]
    if not parsed:
        raise ValueError("stages must name at least one, got none")
    for stage in parsed:
        for name, value in stage._asdict().items():
            _INTERVALS[name].check(f"{name} in stages", value)
    return parsed


def steps_of(stages: Sequence[Stage], max_steps: int) -> int:
    """Return the total number of steps of all stages.

    Raises:
        ValueError: ``max_steps`` is neither −1 nor this number.
    """
    total = sum(stage.steps for stage in stages)
    if max_steps not in (-1, total):
        raise ValueError(f"max_steps must be {total}, the steps of stages together, or left out, got {max_steps}")
    return total


def check_stages(stages: Sequence[Stage], config: QuietStarConfig, block_size: int = 0) -> None:
    """Check that stages fit the configuration and the length of texts.

    Args:
        stages: the stages.
        config: the model's configuration.
        block_size: number of tokens of the texts; 0 if unknown.

    Raises:
        ValueError: a stage contradicts a field of the configuration; the message names both.
    """
    most = getattr(config, "max_position_embeddings", None)
    for stage in stages:
        needed = max(block_size, stage.lookahead + 2) + stage.thought_length
        if most is not None and needed > most:
            texts = f" behind texts of {block_size}" if block_size else ""
            raise ValueError(
                f"stages must have thoughts that fit into max_position_embeddings = {most}, got {stage}{texts}, which "
                f"needs {needed}"
            )
        if stage.thought_length == 0 and config.learned_thought_end:
            raise ValueError(f"stages must have thoughts of at least 1 token with learned_thought_end, got {stage}")
        if stage.steps % config.policy_updates:
            raise ValueError(
                f"stages must have steps that are multiples of policy_updates = {config.policy_updates}, got {stage}"
            )


class SetsStage(TrainerCallback):
    """Sets the configuration's fields to those of the next step's stage; after the last step, to the last stage's."""

    def __init__(self, stages: Sequence[Stage], config: QuietStarConfig):
        self.stages, self.config = stages, config

    def on_train_begin(self, args, state, control, **kwargs):
        self._set(state.global_step)

    on_step_begin = on_train_begin

    def _set(self, step: int) -> None:
        for stage in self.stages:
            if step < stage.steps:
                break
            step -= stage.steps
        self.config.thought_length, self.config.lookahead = stage.thought_length, stage.lookahead
