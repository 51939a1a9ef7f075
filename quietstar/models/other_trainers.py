"""Errors for trainers that bypass the model's forward pass and would train it without thoughts.

TRL's trainers, Liger's kernels and others that compute the loss in chunks call the decoder and the head themselves.
"""

from torch import Tensor, nn

_USE_OURS = "use quietstar.QuietStarTrainer or the command `quietstar train`"


class RefusesOtherTrainers:
    """Mixin for models that makes TRL's trainers fail on construction, when they add their tag to the model."""

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Add tags as every transformers model does.

        Raises:
            ValueError: a tag is that of a TRL trainer.
        """
        if "trl" in ([tags] if isinstance(tags, str) else tags):
            raise ValueError(
                f"a Quiet-STaR model must be trained with thoughts, got a TRL trainer ({', '.join(tags)}), which goes "
                f"around them; {_USE_OURS}"
            )
        super().add_model_tags(tags)


def check_thinks(module: nn.Module, query: Tensor) -> None:
    """Refuse to train an attention layer that is called without a layout of thoughts.

    In evaluation, or if no parameter of the decoder is trained, the decoder may be used alone.

    Args:
        module: the attention layer.
        query: its queries.

    Raises:
        ValueError: the layer is being trained.
    """
    if module.training and query.requires_grad:
        raise ValueError(
            "a Quiet-STaR model must be trained with thoughts, got a step that trains the decoder without the model "
            f"around it, as TRL's trainers and Liger's kernels do; {_USE_OURS}"
        )
