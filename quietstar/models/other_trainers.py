"""Trainers that go around the model's forward pass would train it without thoughts: they are told so.

TRL's trainers, Liger's kernels and others that compute the loss in chunks call the decoder and the head themselves.
"""

from torch import Tensor, nn

_USE_OURS = "use quietstar.QuietStarTrainer or the command `quietstar train`"


class RefusesOtherTrainers:
    """A mixin of models: TRL's trainers, which all put their tag on the model they are made for, cannot be made."""

    def add_model_tags(self, tags: list[str] | str) -> None:
        """As of every transformers model.

        Raises:
            ValueError: the tag of a TRL trainer.
        """
        if "trl" in ([tags] if isinstance(tags, str) else tags):
            raise ValueError(
                f"a Quiet-STaR model must be trained with thoughts, got a TRL trainer ({', '.join(tags)}), which goes "
                f"around them; {_USE_OURS}"
            )
        super().add_model_tags(tags)


def check_thinks(module: nn.Module, query: Tensor) -> None:
    """An attention layer that is not given a layout of thoughts is not being trained.

    In evaluation, and where nothing of the decoder is trained, the decoder may be used alone.

    Args:
        module: the attention layer.
        query: what it is to attend with.

    Raises:
        ValueError: it is.
    """
    if module.training and query.requires_grad:
        raise ValueError(
            "a Quiet-STaR model must be trained with thoughts, got a step that trains the decoder without the model "
            f"around it, as TRL's trainers and Liger's kernels do; {_USE_OURS}"
        )
