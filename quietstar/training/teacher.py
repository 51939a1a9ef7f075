"""The teacher in training, whose predictions thoughts are compared with, or which the model learns (distillation)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quietstar.models import QuietStarConfig, QuietStarForCausalLM
from quietstar.training.wrapped import Answer, call_inside, fields, forget_gathered, part_here, part_of, whole

FILE_NAME = "teacher.safetensors"

# The entries of a batch that every pass is given.
_TEXT = "input_ids", "inputs_embeds", "attention_mask", "position_ids"


class AverageTeacher:
    """A moving average of the model's trained weights or, if never updated, a frozen copy of the initial model.

    Each process stores its own part of every trained parameter, in float32 or wider. So the teacher is sharded like the
    model, and with adapters only these are stored twice. To answer, the teacher's weights are temporarily put into the
    model. Before ``start``, the teacher is the model itself.
    """

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, model: nn.Module, checkpoint: str | PathLike | None = None) -> None:
        """Copy the present model, or load what ``save`` wrote into a checkpoint.

        Raises:
            ValueError: DeepSpeed has sharded the weights, or the checkpoint has no such teacher.
        """
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError(
                "a teacher must not be kept with DeepSpeed ZeRO-3, whose weights cannot be exchanged: take FSDP2 or "
                "ZeRO-2, or another baseline"
            )
        forget_gathered(model)
        if checkpoint is None:
            self._weights = {name: _precise(part).clone() for name, part in self._trained(model)}
            return
        if not (file := Path(checkpoint) / FILE_NAME).is_file():
            raise ValueError(
                f"resume_from_checkpoint must hold {FILE_NAME} of a run with a teacher, got none in {checkpoint}"
            )
        with safe_open(file, "pt") as saved:
            parameters = {name: x for name, x in model.named_parameters() if x.requires_grad}
            if parameters.keys() != set(saved.keys()):
                raise ValueError(f"resume_from_checkpoint must hold a teacher of this model, got another in {file}")
            self._weights = {name: part_of(saved.get_tensor(name), x) for name, x in parameters.items()}

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Set weights to decay · weights + (1 − decay) · the model's, once started."""
        if not self._weights or decay == 1:
            return
        forget_gathered(model)
        for name, part in self._trained(model):
            self._weights[name].lerp_(part.to(self._weights[name].dtype), 1 - decay)

    @torch.no_grad()
    def save(self, model: nn.Module, folder: str | PathLike, writes: bool) -> None:
        """Write unsharded weights into a checkpoint; all processes must call this, and one of them ``writes``."""
        if not self._weights:
            return
        forget_gathered(model)
        tensors = {}
        for name, parameter in model.named_parameters():
            if name in self._weights:
                tensor = whole(self._weights[name], parameter)
                if writes:
                    tensors[name] = tensor.cpu().contiguous()
        if writes:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(tensors, Path(folder) / FILE_NAME)

    @torch.no_grad()
    def ask(
        self, wrapped: nn.Module, model: QuietStarForCausalLM, question: Callable[[QuietStarForCausalLM], Answer]
    ) -> Answer:
        """Return the teacher's answer, in evaluation mode and without gradients.

        Args:
            wrapped: the model in its training wrappers.
            model: the model inside them.
            question: function that computes the answer from the model.
        """
        training = wrapped.training
        with self._in_place(wrapped):
            wrapped.eval()
            try:
                return call_inside(wrapped, model, lambda: question(model))
            finally:
                wrapped.train(training)

    @contextmanager
    def _in_place(self, wrapped: nn.Module) -> Iterator[None]:
        """Put the teacher's weights into the model inside the context."""
        if not self._weights:
            yield
            return
        plain = getattr(wrapped, "_orig_mod", wrapped)
        plain = getattr(plain, "module", plain)  # unwrap DDP and DeepSpeed
        forget_gathered(plain)
        own = {}
        for name, part in self._trained(plain):
            own[name] = part.clone()
            part.copy_(self._weights[name])
        try:
            yield
        finally:
            forget_gathered(plain)
            for name, part in self._trained(plain):
                part.copy_(own[name])

    @staticmethod
    def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield name, part_here(parameter.detach())


class GivenTeacher:
    """A frozen teacher that is another model, unsharded on every process."""

    def __init__(self, model: QuietStarForCausalLM, config: QuietStarConfig, device: torch.device):
        if not isinstance(model, QuietStarForCausalLM):
            raise TypeError(f"teacher must be a QuietStarForCausalLM, got {type(model).__name__}")
        if model.config.vocab_size != config.vocab_size:
            raise ValueError(
                f"teacher must have the vocab_size of model, {config.vocab_size}, got {model.config.vocab_size}"
            )
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError("teacher must not be sharded by DeepSpeed ZeRO-3: take FSDP2, DDP or ZeRO-2")
        self.model = model.to(device).requires_grad_(False).eval()

    def start(self, model: nn.Module, checkpoint: str | PathLike | None = None) -> None:
        """Do nothing."""

    def update(self, model: nn.Module, decay: float) -> None:
        """Do nothing."""

    def save(self, model: nn.Module, folder: str | PathLike, writes: bool) -> None:
        """Do nothing: the teacher stays available where it was loaded from."""

    @torch.no_grad()
    def ask(
        self, wrapped: nn.Module, model: QuietStarForCausalLM, question: Callable[[QuietStarForCausalLM], Answer]
    ) -> Answer:
        """Return the teacher's answer."""
        return question(self.model)


def _precise(part: Tensor) -> Tensor:
    """Widen a tensor to float32, in which a moving average does not lose small steps as in bfloat16."""
    return part if part.dtype == torch.float64 else part.float()


def text_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of a batch that specify the text."""
    return {name: inputs[name] for name in _TEXT if inputs.get(name) is not None}


def thoughts_of(model: QuietStarForCausalLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Choose anchors, if not every position thinks, and sample thoughts there, as arguments of the forward pass."""
    config, text = model.config, text_of(inputs)
    anchors = inputs.get("anchors")
    if anchors is None:
        anchors = model.choose_anchors(labels=inputs["labels"], **text)
    if anchors is None:
        thoughts, drawn = model.sample_thoughts(**text), {}
    else:
        behind = anchors.repeat_interleave(config.num_thoughts, dim=1)
        thoughts = model.sample_thoughts(**text, anchors=behind)
        thoughts, drawn = thoughts.unflatten(1, (-1, config.num_thoughts)).transpose(1, 2), {"anchors": anchors}
    if config.learned_thought_end:
        drawn["thought_lengths"] = (thoughts >= 0).sum(dim=-1)
    return drawn | {"thought_tokens": thoughts}


def logprobs_of(
    teacher: QuietStarForCausalLM, config: QuietStarConfig, inputs: dict[str, Tensor], thoughts: dict[str, Tensor]
) -> Tensor:
    """Compute ``teacher_logprobs``: a teacher's log p of thoughts, as the model with ``config`` computes its own."""
    shape = {name: getattr(config, name) for name in ("thought_length", "num_thoughts", "lookahead")}
    shape |= {name: getattr(config, name) for name in ("policy_temperature", "learned_thought_end")}
    with fields(teacher.config, **shape, **WITHOUT_TEACHER):
        output = teacher.forward(**text_of(inputs), labels=inputs["labels"], **thoughts)
    return output.thought_logprobs


# Configuration of an objective that needs no tensors from outside the pass.
WITHOUT_TEACHER = {"baseline": "self", "reward": "log_likelihood", "advantage": "mean", "kl_weight": 0.0}
