"""Training Quiet-STaR: the trainer, and what the command `quietstar train` is made of."""

from quietstar.training.checks import NonFiniteError
from quietstar.training.lora import lora_config
from quietstar.training.trainer import QuietStarTrainer

__all__ = ["NonFiniteError", "QuietStarTrainer", "lora_config"]
