"""Training of Quiet-STaR models: the trainer, and the parts of the command `quietstar train`."""

from quietstar.training.checks import NonFiniteError
from quietstar.training.lora import lora_config
from quietstar.training.trainer import QuietStarTrainer

__all__ = ["NonFiniteError", "QuietStarTrainer", "lora_config"]
